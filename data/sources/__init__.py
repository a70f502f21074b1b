"""Sources of training data: one file per kind of source."""

from pathlib import Path

from common.errors import DataError
from data.config import BlankConfig, DataConfig, SourceConfig
from data.sources.base import Source
from models.base import ModelFamily

__all__ = ["Source", "detect_kind", "open_source"]


def detect_kind(path: Path) -> str:
    """Return the kind of a source, by the files in its folder."""
    from data.sources.comfy_shards import is_comfy_folder
    from data.sources.encoded import is_encoded_folder
    from data.sources.table import data_files, is_saved_dataset

    if is_comfy_folder(path):
        return "comfyui"
    if is_encoded_folder(path):
        return "encoded"
    if not path.is_dir() or is_saved_dataset(path) or data_files(path):
        return "dataset"
    return "images"


def open_source(
    config: SourceConfig, data: DataConfig, family: ModelFamily, component_hashes: dict[str, str]
) -> Source:
    """Return a source, without reading anything of it.

    `component_hashes`: hashes of the family's VAE and text encoders."""
    if isinstance(config, BlankConfig):
        from data.sources.blank import BlankSource

        return BlankSource(config, data)
    kind = config.kind if config.kind != "auto" else detect_kind(Path(config.path))
    takes_controls = family.controls.max_count > 0
    check_control_options(config, kind)
    if kind == "images":
        from data.sources.folder import FolderSource

        has_videos = family.media == "video"
        return FolderSource(config, data, has_videos, takes_controls)
    if kind == "dataset":
        from data.sources.table import TableSource

        return TableSource(config, data.cache_dir, takes_controls)
    if kind == "comfyui":
        from data.sources.comfy import ComfySource

        return ComfySource(config, family)
    from data.sources.encoded import EncodedSource

    return EncodedSource(config, data, component_hashes)


def check_control_options(config: SourceConfig, kind: str) -> None:
    """Raise DataError for options about control images that a kind of source has no use for."""
    options = {
        "control_paths": (config.control_paths, ("images",)),
        "control_columns": (config.control_columns, ("images", "dataset")),
    }
    for name, (value, kinds) in options.items():
        if value and kind not in kinds:
            raise DataError(
                f"--data.{name} {' '.join(value)}: has no effect on {config.path}, whose kind is "
                f"{kind}. Set the option for the sources that it is for"
            )
