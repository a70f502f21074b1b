"""Copies a diffusers folder without the weights of its denoiser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import ModelError, error_list
from models.config import index_path
from tools.rewrite import ToolError

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".ckpt",
    ".pt",
    ".pth",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".h5",
)


def copy_without(source: Path, target: Path, merged_files: list[Path]) -> list[Path]:
    """Copy a model without the files that are merged, and without other weights of its denoiser.

    Return these other weights, relative to `source`. Links are followed. Raises ModelError for
    broken links, and ToolError for components that cannot be copied."""
    # listed before anything is written: a link may lead to the target
    all_paths = list(paths_below(source, (source.resolve(),)))
    copied_paths = []
    foreign_weights = []
    for path in all_paths:
        if path in merged_files:
            continue
        if is_foreign_weight(path, source, merged_files):
            foreign_weights.append(path.relative_to(source))
        else:
            copied_paths.append(path)
    check_links(source, copied_paths)
    for path in copied_paths:
        copied_path = target / path.relative_to(source)
        if path.is_dir():
            copied_path.mkdir(parents=True, exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, copied_path)
    check_components(source, target)
    return foreign_weights


def check_links(source: Path, paths: list[Path]) -> None:
    """Raise ModelError naming the links whose targets do not exist."""
    errors = []
    for path in paths:
        if not path.exists():
            name = path.relative_to(source)
            errors.append(f"{name}: is a link to a file that does not exist")
    if errors:
        raise ModelError(error_list(f"{source} is incomplete", errors))


def check_components(source: Path, target: Path) -> None:
    """Raise ToolError naming the components that were not copied."""
    missing_names = []
    for name in component_names(source):
        is_copied = (target / name).is_dir()
        if (source / name).is_dir() and not is_copied:
            missing_names.append(name)
    if missing_names:
        names = ", ".join(missing_names)
        raise ToolError(
            f"{source} cannot be copied: {names} would be missing, because of links to the folder "
            "itself"
        )


def paths_below(folder: Path, outer_folders: tuple[Path, ...]) -> Iterator[Path]:
    """Yield all paths below a folder. Links are followed, because components are often links to
    another model or to a cache of the Hub.

    A link back to one of `outer_folders`, the resolved folders around it, is left out: it has no
    end.
    """
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
            continue
        resolved_path = path.resolve()
        leads_back = any(outer.is_relative_to(resolved_path) for outer in outer_folders)
        if not leads_back:
            yield path
            yield from paths_below(path, (*outer_folders, resolved_path))


def is_foreign_weight(path: Path, source: Path, merged_files: list[Path]) -> bool:
    """Return whether a file has weights of the denoiser that are not merged.

    These are another variant, the weights of another program, or a whole checkpoint next to the
    folders."""
    denoiser_folder = merged_files[0].parent
    if path.is_dir() or path.parent not in (source, denoiser_folder):
        return False
    if not path.name.endswith(".index.json"):
        return path.suffix in WEIGHT_SUFFIXES
    shard_of_key = read_json(path).get("weight_map", {})
    if not isinstance(shard_of_key, dict):
        return True
    merged_names = {file.name for file in merged_files}
    return not set(shard_of_key.values()) <= merged_names


def component_names(source: Path) -> list[str]:
    """Return the folders of a pipeline."""
    components = read_json(index_path(source))
    return [name for name, value in components.items() if isinstance(value, list)]


def read_json(path: Path) -> dict:
    """Return a JSON object. Raises ModelError if the file has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} is not readable as JSON: expected an object with names and values"
        )
    return content
