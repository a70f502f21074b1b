"""Encodes images and captions once, into stores on disk; a second run encodes nothing, a changed caption one row.

Every rank encodes its share, one image at a time: the bytes do not depend on the number of ranks or on the neighbours.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from data.batches import LatentDataset
from data.config import DataConfig, DataError
from data.identity import digest, files_identity
from data.sources import SourceImage, decode, raise_faults, scan
from data.store import Store
from models.base import ModelFamily

VERSION = "1"  # of what is stored; a change makes every row be encoded anew


@dataclass(frozen=True)
class Datasets:
    """The run's encoded images, and how much of them had to be encoded now."""

    train: LatentDataset
    validation: LatentDataset | None
    encoded_images: int
    encoded_captions: int


def build_datasets(config: DataConfig, family: ModelFamily, accelerator: Accelerator) -> Datasets:
    """Scans, checks and encodes what `config` names. Raises DataError with all bad files at once.

    Collective: every rank calls it, and every rank returns the same datasets.
    """
    assert config.images is not None  # load_config refuses a run without images
    images, faults = scan(config.images, config)
    held_out: list[SourceImage] = []
    if config.validation_images is not None:
        held_out, more = scan(config.validation_images, config)
        faults += more
    cache = Path(config.cache_dir)
    options = f"{VERSION} mode {config.resolution}"
    media = Store(cache / f"media-{digest(options, files_identity(family.component_files('vae'), cache))}")
    text = Store(cache / f"text-{digest(VERSION, files_identity(family.component_files('text'), cache))}")

    keys = {image: digest(image.read()) for image in [*images, *held_out]}
    new_images = {key: image for image, key in keys.items() if key not in media}
    new_captions = {digest(image.caption): image.caption for image in keys if digest(image.caption) not in text}
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    mine = dict(list(new_images.items())[share])
    raise_faults(sorted(set(faults) | set(all_ranks(undecodable(mine.values(), config.resolution), accelerator))))

    if new_images or new_captions:
        encode(config, family, accelerator, (media, mine), (text, dict(list(new_captions.items())[share])))
    accelerator.wait_for_everyone()
    media.reload()
    text.reload()

    if config.validation_share:
        images, held_out = split(images, keys, config.validation_share)
    train = LatentDataset(images, keys, media, text)
    validation = LatentDataset(held_out, keys, media, text) if held_out else None
    return Datasets(train, validation, len(new_images), len(new_captions))


def undecodable(images: Iterable[SourceImage], resolution: int) -> list[str]:
    """What is wrong with each image that cannot be read."""
    faults = []
    for image in images:
        try:
            decode(image.read(), resolution)
        except DataError as error:
            faults.append(f"{image.name}: {error}")
    return faults


def all_ranks(items: list[str], accelerator: Accelerator) -> list[str]:
    return gather_object(items) if accelerator.num_processes > 1 else items


def split(
    images: list[SourceImage], keys: dict[SourceImage, str], share: float
) -> tuple[list[SourceImage], list[SourceImage]]:
    """Holds out the `share` of images whose content hash is lowest: whatever the seed and the file names."""
    count = max(1, round(share * len(images)))
    if count >= len(images):
        raise DataError(f"--data.validation_share {share} of {len(images)} images leaves none to train on")
    held_out = set(sorted(images, key=lambda image: keys[image])[:count])
    return [image for image in images if image not in held_out], [image for image in images if image in held_out]


@torch.no_grad()
def encode(
    config: DataConfig,
    family: ModelFamily,
    accelerator: Accelerator,
    media: tuple[Store, dict[str, SourceImage]],
    text: tuple[Store, dict[str, str]],
) -> None:
    """Writes this rank's share of the missing rows. The encoders live and die in here."""
    encoders = family.load_encoders().to(accelerator.device)
    device = accelerator.device

    def conditioning(caption: str) -> dict[str, Tensor]:
        return family.encode_prompt(encoders, [caption])[0]

    def latents(image: SourceImage) -> dict[str, Tensor]:
        pixels = decode(image.read(), config.resolution)[None].to(device)
        return {"latents": family.encode_media(encoders, pixels)[0]}

    def rows(items: dict[str, Any], encode_one: Callable[[Any], dict[str, Tensor]], what: str) -> Iterator:
        hidden = not accelerator.is_main_process or not items
        for key, item in tqdm(items.items(), desc=f"encoding {what}", disable=hidden):
            yield key, encode_one(item)

    text[0].write(rows(text[1], conditioning, "captions"))
    media[0].write(rows(media[1], latents, "images"))
