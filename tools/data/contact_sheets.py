"""Contact sheets: one PNG per bucket, with images as training sees them over their captions."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from common.atomic import write_file
from common.errors import DataError
from data.precompute.build import DataPlan
from data.precompute.encode import decode_pixels
from data.precompute.run_sources import ListedContent
from data.precompute.streams import IMAGES_AHEAD, map_ahead
from data.samples import ListedSample, PlannedSample
from data.store.store import MISSING
from data.store.tables import list_starts
from models.base import ModelFamily
from tools.data.survey import Survey, shown, sizes
from training.reporting.image_grid import to_image, wrapped_text

MOST_IMAGES = 48
COLUMNS = 8
SIDE = 176  # pixels, of a thumbnail's longer side
NARROWEST = 128  # pixels, of a column: captions need them
GAP = 10
NAME_LINE, CAPTION_LINES, LINE = 16, 3, 14
FIRST_LETTERS = 300  # of a caption are looked at: no more has a place
BEFORE_IMAGES = "run the training with these options, which encodes first, and then ask again"

Size = tuple[int, int]
Drawable = tuple[int, PlannedSample, ListedSample, Image.Image]


@dataclass(frozen=True)
class Tile:
    """One image of a sheet."""

    picture: Image.Image
    name: str
    caption: str


@dataclass
class Drawn:
    """What was written, and what could not be drawn."""

    written: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.lacking else 0

    def lines(self) -> list[str]:
        return [*(f"wrote {file}" for file in self.written), *self.lacking]


def draw(planned: DataPlan, survey: Survey, folder: Path, decode: bool) -> Drawn:
    """Writes a sheet into `folder` for every bucket, of the images or, with `decode`, of their
    latents."""
    chosen, images_of = chosen_rows(planned, decode)
    tiles: dict[Size, list[Tile]] = {size: [] for size in chosen}
    rows = np.sort(np.concatenate([*chosen.values(), np.empty(0, np.int64)])).astype(np.int64)
    make = decoded(planned, survey, rows) if decode else pictured(planned, rows)
    for number, row, cells, picture in tqdm(make, desc="drawing", total=len(rows)):
        name = survey.name(cells) + " (held out)" * bool(survey.held_out[number])
        crop = row.crop
        caption = (cells.captions or [""])[0]
        tiles[(crop.crop_width, crop.crop_height)].append(Tile(picture, name, caption))
    drawn = Drawn()
    for (width, height), found in tiles.items():
        file = folder / f"bucket_{width}x{height}.png"
        count = images_of[width, height]
        if found:
            of_all = f"{len(found)} of {count} image{'s' * (count > 1)}"
            title = f"{width} x {height} pixels: {of_all}{', decoded from latents' * decode}"
            write_file(file, sheet(title, found))
            drawn.written.append(str(file))
        if len(found) < min(count, MOST_IMAGES):
            drawn.lacking.append(lack(file, count, len(found), decode))
    return drawn


def lack(file: Path, count: int, found: int, decode: bool) -> str:
    """Why a sheet has fewer images than it might."""
    if decode:
        some = (
            f"shows the {found} of {count} images that are encoded"
            if found
            else "not drawn: nothing is encoded yet"
        )
        return f"{file.name} {some}. For all, {BEFORE_IMAGES}, or leave off --decode"
    some = (
        f"shows the {found} of {count} that are images" if found else "not drawn: it has no images"
    )
    return f"{file.name} {some}. The others are latents already; --decode draws them"


def chosen_rows(planned: DataPlan, decode: bool) -> tuple[dict[Size, np.ndarray], dict[Size, int]]:
    """For every bucket the rows to draw, spread evenly over those that can be, and how many rows it
    has."""
    found = sizes(planned.job.planned).astype(np.int64)
    can = drawable(planned) if decode else planned.job.have_images()
    codes, of_row, counts = np.unique(
        found[:, 0] << 32 | found[:, 1], return_inverse=True, return_counts=True
    )
    buckets = [(int(code >> 32), int(code & (2**32 - 1))) for code in codes]
    chosen = {}
    for i, size in enumerate(buckets):
        rows = np.flatnonzero((of_row == i) & can)
        places = np.linspace(0, len(rows) - 1, min(len(rows), MOST_IMAGES)).round().astype(np.int64)
        chosen[size] = rows[places]
    return chosen, dict(zip(buckets, counts.tolist(), strict=True))


def drawable(planned: DataPlan) -> np.ndarray:
    """The rows whose latents are stored, or in the source as latents."""
    rows = planned.job.planned
    first = list_starts(rows.lengths("media_keys"))
    return (
        planned.stores.media.find(rows.keys("media_keys")[first]) != MISSING
    ) | ~planned.job.have_images()


def cells_of(planned: DataPlan, rows: np.ndarray) -> list[tuple[int, PlannedSample, ListedSample]]:
    """Number and cells of rows, with those of their entries; a sheet's worth for every bucket."""
    return [
        (number, row, entry)
        for number, (row, entry) in zip(rows.tolist(), planned.job.samples(rows), strict=True)
    ]


def pictured(planned: DataPlan, rows: np.ndarray) -> Iterator[Drawable]:
    """Thumbnails of images, each source read once from front to back."""
    wanted = cells_of(planned, rows)
    by_entry: dict[int, list[tuple[int, PlannedSample]]] = {}
    for number, row, _ in wanted:
        by_entry.setdefault(row.listed, []).append((number, row))
    background = planned.job.config.background

    def thumbnails_of(given: ListedContent) -> list[Drawable]:
        entry, cells, content = given
        found = []
        try:
            if isinstance(content, DataError):
                raise content
            for number, row in by_entry[entry]:
                first = replace(row.clip, frames=1) if row.clip else None
                pixels = decode_pixels(content, row.crop, first, background)
                found.append((number, row, cells, thumbnail(pixels)))
        except DataError as error:
            raise DataError(f"{cells.name}: {error}") from error
        return found

    listed = {row.listed: cells for _, row, cells in wanted}
    contents = planned.job.planner.sources.contents(listed.items())
    for found in map_ahead(thumbnails_of, contents, IMAGES_AHEAD):
        yield from found


@torch.no_grad()
def decoded(planned: DataPlan, survey: Survey, rows: np.ndarray) -> Iterator[Drawable]:
    """Thumbnails of what the VAE makes of latents, one after another: large ones take gigabytes."""
    if not len(rows):
        return
    family, device = survey.family, planned.job.device
    encoders = family.load_encoders("media").to(device)
    of_source: dict[int, dict[int, tuple[int, PlannedSample, ListedSample]]] = {}
    for number, row, cells in cells_of(planned, rows):
        if row.media_keys[0] in planned.stores.media:
            latents = planned.stores.media[row.media_keys[0]]["latents"]
            yield number, row, cells, picture_of(family, encoders, latents.to(device))
        else:
            of_source.setdefault(cells.source, {})[cells.row] = (number, row, cells)
    for source, found in of_source.items():
        samples = [cells for _, (_, _, cells) in sorted(found.items())]
        for sample, latents, _ in planned.job.planner.sources.opened[source].tensors(samples):
            yield *found[sample.row], picture_of(family, encoders, latents.to(device))


def picture_of(family: ModelFamily, encoders: Any, latents: Tensor) -> Image.Image:
    pixels = family.decode_media(encoders, latents[None].float())[0].cpu()
    return thumbnail(pixels if pixels.ndim == 3 else pixels[:, 0])  # of a video the first frame


def thumbnail(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in [-1, 1] with a longer side of SIDE; tiny ones are enlarged by a whole
    number."""
    image = to_image(pixels)
    longest = max(image.size)
    if longest < SIDE:
        zoom = max(1, SIDE // longest)
        return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def sheet(title: str, tiles: list[Tile]) -> bytes:
    """A PNG of tiles of one size, each over its name and its caption."""
    font, small = ImageFont.load_default(size=12), ImageFont.load_default(size=11)
    width, height = max(NARROWEST, tiles[0].picture.width), tiles[0].picture.height
    step_x, step_y = width + GAP, height + NAME_LINE + CAPTION_LINES * LINE + 2 * GAP
    columns = min(COLUMNS, len(tiles))
    least = round(font.getlength(title)) + 2 * GAP
    size = (max(GAP + columns * step_x, least), 30 + -(-len(tiles) // columns) * step_y)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    pen.text((GAP, 8), title, fill="black", font=font)
    for i, tile in enumerate(tiles):
        x, y = GAP + i % columns * step_x, 30 + i // columns * step_y
        left = x + (width - tile.picture.width) // 2
        page.paste(tile.picture, (left, y))
        edge = (left - 1, y - 1, left + tile.picture.width, y + tile.picture.height)
        pen.rectangle(
            edge, outline="#cccccc"
        )  # else white images have no edge, and the crop cannot be seen
        y += height + 3
        pen.text(
            (x, y),
            ending(drawable_text(tile.name, small), width, small),
            fill="#777777",
            font=small,
        )
        caption = (
            wrapped_text(drawable_text(tile.caption, font), width, font, CAPTION_LINES)
            if tile.caption
            else ""
        )
        pen.multiline_text(
            (x, y + NAME_LINE),
            caption or "(no caption)",
            fill="black" if caption else "#bb0000",
            font=font,
            spacing=2,
        )
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()


def drawable_text(text: str, font: Any) -> str:
    """Text in one line that the font can be asked to draw."""
    line = shown(text, FIRST_LETTERS)
    try:
        font.getlength(line)
    except UnicodeEncodeError:  # the font that Pillow has without FreeType
        line = line.encode("ascii", "replace").decode()
    return line


def ending(text: str, width: int, font: Any) -> str:
    """The end of `text` that fits: of a path, that says the most."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"
