"""Reads emoji images and their names from the npm packages emoji-datasource-google and
emoji-datasource-twitter."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CATEGORIES = ("Animals & Nature", "Food & Drink", "Smileys & Emotion")


@dataclass(frozen=True)
class Emoji:
    """One emoji: its short name (unique), the caption the models are trained on, and its 64x64 PNG."""

    name: str
    caption: str
    path: Path


def read_emoji(
    node_modules: Path, vendor: str, categories: tuple[str, ...] | None = CATEGORIES
) -> list[Emoji]:
    """All emoji of `vendor` ("google" or "twitter") in `categories` (None: every category), in
    Unicode order."""
    package = node_modules / f"emoji-datasource-{vendor}"
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    entries = [
        e
        for e in entries
        if e[f"has_img_{vendor}"] and (categories is None or e["category"] in categories)
    ]
    entries.sort(key=lambda e: e["sort_order"])
    return [
        Emoji(
            e["short_name"].replace("-", "_"),
            caption_of(e),
            package / "img" / vendor / "64" / e["image"],
        )
        for e in entries
    ]


def caption_of(entry: dict) -> str:
    """The Unicode name followed by the kind of thing it is: "tiger face, animal"."""
    kind = (entry["subcategory"] or entry["category"]).split("-")[0].lower()
    return f"{entry['name'].replace('-', ' ').lower()}, {kind}"


def load_pixels(emoji: list[Emoji]) -> torch.Tensor:
    """Images over white as (N, 3, 64, 64) in [-1, 1]."""
    return torch.stack([to_tensor(flatten(Image.open(e.path))) for e in emoji])


def flatten(image: Image.Image) -> Image.Image:
    """The image over a white background, as RGB."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def save_grid(rows: list[torch.Tensor], path: Path, zoom: int = 1) -> None:
    """Writes rows of (N, 3, H, W) images in [-1, 1] as one PNG."""
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    array = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.LANCZOS).save(path)
