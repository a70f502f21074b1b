"""Finds images with their captions, in a folder or in a Hugging Face dataset, and turns an image into pixels."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data.config import DataConfig, DataError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp"}
MOST_LISTED = 50


@dataclass(frozen=True, eq=False)  # two images may well have the same name and caption
class SourceImage:
    """One image of a source: where it is, what it shows, how often it is seen per epoch, and its file's content."""

    name: str
    caption: str
    repeats: int
    read: Callable[[], bytes]


def scan(images: str, config: DataConfig) -> tuple[list[SourceImage], list[str]]:
    """All images below `images` in a fixed order, and the faults of their captions; opens no image."""
    folder = Path(images)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return scan_dataset(folder, config)
    return scan_folder(folder, config)


def scan_folder(folder: Path, config: DataConfig) -> tuple[list[SourceImage], list[str]]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    paths = [f for f in files if f.suffix.lower() in EXTENSIONS]
    captions = {f.with_suffix(""): f for f in files if f.suffix == config.caption_extension}
    if not paths:
        found = ", ".join(sorted({f.suffix or f.name for f in files})) or "nothing"
        return [], [f"{folder}: no image ({', '.join(sorted(EXTENSIONS))}); it holds {found}"]
    texts, faults = read_captions(folder, paths, captions, config)
    result = [
        SourceImage(str(path.relative_to(folder)), text, repeats_of(path, folder), path.read_bytes)
        for path, text in zip(paths, texts, strict=True)
    ]
    return result, faults


def read_captions(
    folder: Path, paths: list[Path], captions: dict[Path, Path], config: DataConfig
) -> tuple[list[str], list[str]]:
    """One caption per image. One caption for many images is repeated; any other mismatch is a fault."""
    if config.caption is not None:
        faults = [f"{f}: a caption file beside --data.caption; keep one of the two" for f in captions.values()]
        return [config.caption] * len(paths), faults
    stems = {path.with_suffix("") for path in paths}
    orphans = sorted(f for stem, f in captions.items() if stem not in stems)
    if len(captions) == 1 and len(orphans) == 1:
        text, fault = read_caption(orphans[0])
        return [text] * len(paths), [fault] if fault else []
    faults = [f"{f}: a caption without an image" for f in orphans]
    texts = []
    for path in paths:
        file = captions.get(path.with_suffix(""))
        if file is None:
            faults.append(f"{path}: no caption file {path.stem}{config.caption_extension} beside it")
            texts.append("")
            continue
        text, fault = read_caption(file)
        texts.append(text)
        faults += [fault] if fault else []
    if not captions:
        faults = [f"{folder}: {len(paths)} images, no {config.caption_extension} file; give one caption for all as "
                  "--data.caption, or write caption files"]  # fmt: skip
    return texts, faults


def read_caption(file: Path) -> tuple[str, str | None]:
    """A caption, and what is wrong with it."""
    try:
        return file.read_bytes().decode("utf-8-sig").strip(), None
    except UnicodeDecodeError as error:
        return "", f"{file}: not UTF-8 (byte {error.start}: {error.reason})"


def repeats_of(path: Path, folder: Path) -> int:
    """kohya's convention: an image in a folder named `<repeats>_<name>` is seen that often per epoch."""
    for parent in [path.parent, *path.parent.parents]:
        if match := re.fullmatch(r"(\d+)_.*", parent.name):
            return max(1, int(match[1]))
        if parent == folder:
            break
    return 1


def scan_dataset(folder: Path, config: DataConfig) -> tuple[list[SourceImage], list[str]]:
    """A Hugging Face dataset on disk; of several splits, `train` or the only one."""
    import datasets  # slow import, needed here and in the store

    loaded: Any = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) > 1:
            return [], [f"{folder}: splits {', '.join(loaded)}; name the folder of one of them"]
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    faults = [
        f"{folder}: no column {column}; it has {', '.join(loaded.column_names)} (--data.{flag})"
        for flag, column in (("image_column", config.image_column), ("caption_column", config.caption_column))
        if column not in loaded.column_names and not (flag == "caption_column" and config.caption is not None)
    ]
    if faults or not len(loaded):
        return [], faults or [f"{folder}: the dataset is empty"]
    raw = loaded.cast_column(config.image_column, datasets.Image(decode=False))

    def reader(index: int) -> Callable[[], bytes]:
        def read() -> bytes:
            cell = raw[index][config.image_column]
            return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

        return read

    captions = [config.caption] * len(raw) if config.caption is not None else raw[config.caption_column][:]
    faults = [f"{folder} row {i}: no caption" for i, text in enumerate(captions) if not isinstance(text, str)]
    return [SourceImage(f"row {i}", str(text), 1, reader(i)) for i, text in enumerate(captions)], faults


def decode(data: bytes, resolution: int) -> Tensor:
    """An image file's content as pixels (3, resolution, resolution) in [-1, 1]: resized, centre-cropped, over white.

    Raises DataError saying why the bytes are no image.
    """
    if not data:
        raise DataError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except UnidentifiedImageError as error:
        raise DataError("not an image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"damaged ({error})") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def raise_faults(faults: list[str]) -> None:
    """One DataError for all faults of a run's images and captions."""
    if faults:
        more = [f"... and {len(faults) - MOST_LISTED} more"] if len(faults) > MOST_LISTED else []
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        raise DataError("\n  ".join([f"the training data has {count}", *faults[:MOST_LISTED], *more]))
