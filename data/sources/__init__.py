"""Where training data comes from: one file per kind of source."""

from pathlib import Path

from data.config import DataConfig, SourceConfig
from data.sources.base import Entry, Source
from models.base import ModelFamily

__all__ = ["Entry", "Source", "open_source"]


def kind_of(path: Path) -> str:
    """The kind of a source, by the files in its folder."""
    from data.sources.comfy_shards import is_comfy_folder
    from data.sources.table import files_of

    if is_comfy_folder(path):
        return "comfyui"
    if (path / "encoded.json").is_file():
        return "encoded"
    if (
        not path.is_dir()
        or (path / "state.json").is_file()
        or (path / "dataset_dict.json").is_file()
    ):
        return "dataset"
    return "dataset" if files_of(path) else "images"


def open_source(
    config: SourceConfig, data: DataConfig, family: ModelFamily, identities: dict[str, str]
) -> Source:
    """A source without anything of it read. `identities`: hashes of the family's VAE and text
    encoders."""
    kind = config.kind if config.kind != "auto" else kind_of(Path(config.path))
    if kind == "images":
        from data.sources.folder import FolderSource

        return FolderSource(config, data, family.media == "video")
    if kind == "dataset":
        from data.sources.table import TableSource

        return TableSource(config, data.cache_dir)
    if kind == "comfyui":
        from data.sources.comfy import ComfySource

        return ComfySource(config, family)
    from data.sources.encoded import EncodedSource

    return EncodedSource(config, data, identities)
