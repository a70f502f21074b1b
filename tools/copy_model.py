"""A copy of a diffusers folder but for the weights of its denoiser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.errors import ModelError, error_list
from tools.rewrite import ToolError

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5")


def copy_rest(source: Path, target: Path, merged: list[Path]) -> list[Path]:
    """Copies all of `source` but `merged` and other weights of the denoiser, which are returned."""
    found = list(
        below(source, (source.resolve(),))
    )  # before anything is written, which a link may lead to
    left_out = [path for path in found if path not in merged and is_foreign(path, source, merged)]
    files = [path for path in found if path not in merged and path not in left_out]
    broken = [
        f"{path.relative_to(source)}: a link to nothing" for path in files if not path.exists()
    ]
    if broken:
        raise ModelError(error_list(f"{source} is not whole", broken))
    for path in files:
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, place)
    lacking = [
        name
        for name in components(source)
        if (source / name).is_dir() and not (target / name).is_dir()
    ]
    if lacking:
        raise ToolError(
            f"the copy of {source} would lack {', '.join(lacking)}, which lead back to the folder itself"
        )
    return [path.relative_to(source) for path in left_out]


def below(folder: Path, inside: tuple[Path, ...]) -> Iterator[Path]:
    """What is below a folder, behind links too: parts of a model are often links to another's, or
    to a hub's cache.

    A link that leads back to a folder it is in, `inside` being where these really are, has no end
    and is left alone.
    """
    for path in sorted(folder.iterdir()):
        real = path.resolve()
        if not path.is_dir():
            yield path
        elif not any(outer.is_relative_to(real) for outer in inside):
            yield path
            yield from below(path, (*inside, real))


def is_foreign(path: Path, source: Path, merged: list[Path]) -> bool:
    """Whether this is weights of the denoiser that nothing is merged into: another variant's, another program's, or of
    a whole model in one file, which hubs have beside the folders."""
    if path.parent not in (source, merged[0].parent) or path.is_dir():
        return False
    if not path.name.endswith(".index.json"):
        return path.suffix in WEIGHTS
    shards = read_json(path).get("weight_map", {})
    return not isinstance(shards, dict) or not {*shards.values()} <= {
        other.name for other in merged
    }


def components(source: Path) -> list[str]:
    """The folders that a pipeline is made of."""
    return [
        name
        for name, value in read_json(source / "model_index.json").items()
        if isinstance(value, list)
    ]


def read_json(path: Path) -> dict:
    """ModelError if it is not JSON's kind of a dictionary."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not readable as JSON: it holds no names and values")
    return content
