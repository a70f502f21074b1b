"""Emoji images and captions from the npm packages emoji-datasource-google and
emoji-datasource-twitter."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from restyle import over_white

CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion")


@dataclass(frozen=True)
class Emoji:
    """One emoji: its short name (unique), its caption, and its 64x64 PNG with transparency."""

    name: str
    caption: str
    path: Path

    def image(self) -> Image.Image:
        """Return the RGBA picture."""
        return Image.open(self.path).convert("RGBA")


def read_emoji(
    node_modules: Path, vendor: str, categories: tuple[str, ...] | None = CATEGORIES
) -> list[Emoji]:
    """Return the emoji of `vendor` ("google" or "twitter") in Unicode order. `categories`: None
    means all."""
    package = node_modules / f"emoji-datasource-{vendor}"
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    entries.sort(key=lambda entry: entry["sort_order"])
    folder = package / "img" / vendor / "64"
    emoji = []
    for entry in entries:
        is_selected = categories is None or entry["category"] in categories
        if entry[f"has_img_{vendor}"] and is_selected:
            name = entry["short_name"].replace("-", "_")
            emoji.append(Emoji(name, caption_of(entry), folder / entry["image"]))
    return emoji


def caption_of(entry: dict) -> str:
    """Return the Unicode name and the kind of thing: "tiger face, animal"."""
    kind = (entry["subcategory"] or entry["category"]).split("-")[0].lower()
    return f"{entry['name'].replace('-', ' ').lower()}, {kind}"


def load_pixels(emoji: list[Emoji]) -> torch.Tensor:
    """Return the images on white as (N, 3, 64, 64) in [-1, 1]."""
    return torch.stack([to_tensor(over_white(item.image())) for item in emoji])


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def save_grid(rows: list[torch.Tensor], path: Path, zoom: int = 1) -> None:
    """Write rows of (N, 3, H, W) images in [-1, 1] as one PNG."""
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    array = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    size = (image.width * zoom, image.height * zoom)
    image.resize(size, Image.Resampling.LANCZOS).save(path)
