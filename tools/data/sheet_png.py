"""Draws a contact sheet: images of one size, each with its name and its caption, in rows."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from common.text import one_line
from training.reporting.image_grid import wrapped_text

MAX_COLUMNS = 8
MIN_COLUMN_WIDTH = 128
"""Pixels that a caption needs."""
GAP = 10
TITLE_HEIGHT = 30
NAME_HEIGHT = 16
LINE_HEIGHT = 14
MAX_CAPTION_LINES = 3
MAX_TEXT_LENGTH = 300
"""Characters of a text that are considered. More cannot fit."""
EDGE_COLOR = "#cccccc"
NAME_COLOR = "#777777"
MISSING_COLOR = "#bb0000"


@dataclass(frozen=True)
class Tile:
    """One image of a sheet."""

    image: Image.Image
    name: str
    caption: str


class Sheet:
    """A page with tiles of one size."""

    def __init__(self, title: str, tiles: list[Tile]):
        self.font: Any = ImageFont.load_default(size=12)
        self.small_font: Any = ImageFont.load_default(size=11)
        first_image = tiles[0].image
        self.column_width = max(MIN_COLUMN_WIDTH, first_image.width)
        """Width of the images and texts, without the gap next to them."""
        self.image_height = first_image.height
        self.num_columns = min(MAX_COLUMNS, len(tiles))
        self.page = self._make_page(title, len(tiles))
        self.pen = ImageDraw.Draw(self.page)
        self.pen.text((GAP, 8), title, fill="black", font=self.font)
        for number, tile in enumerate(tiles):
            self._draw_tile(number, tile)

    @property
    def row_height(self) -> int:
        """Return the height of a row of tiles, with the gap below it."""
        caption_height = MAX_CAPTION_LINES * LINE_HEIGHT
        tile_height = self.image_height + NAME_HEIGHT + caption_height
        return tile_height + 2 * GAP

    def _make_page(self, title: str, num_tiles: int) -> Image.Image:
        """Return an empty page, wide enough for the title."""
        num_rows = -(-num_tiles // self.num_columns)
        right, bottom = self._corner(num_rows, self.num_columns)
        title_width = round(self.font.getlength(title))
        width = max(right, title_width + 2 * GAP)
        return Image.new("RGB", (width, bottom), "white")

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        """Return the left and the top of a tile in pixels.

        `row`, `column`: counted from 0."""
        column_step = self.column_width + GAP
        x = GAP + column * column_step
        y = TITLE_HEIGHT + row * self.row_height
        return x, y

    def _draw_tile(self, number: int, tile: Tile) -> None:
        """Draw the image with an edge, its name and its caption."""
        row, column = divmod(number, self.num_columns)
        x, y = self._corner(row, column)
        self._draw_image(x, y, tile.image)
        name_y = y + self.image_height + 3
        self._draw_name(x, name_y, tile.name)
        self._draw_caption(x, name_y + NAME_HEIGHT, tile.caption)

    def _draw_image(self, x: int, y: int, image: Image.Image) -> None:
        """Draw an image in the middle of its column.

        Without an edge, the crop of an image with a white border would not be visible."""
        margin = self.column_width - image.width
        left = x + margin // 2
        self.page.paste(image, (left, y))
        right = left + image.width
        bottom = y + image.height
        edge = (left - 1, y - 1, right, bottom)
        self.pen.rectangle(edge, outline=EDGE_COLOR)

    def _draw_name(self, x: int, y: int, name: str) -> None:
        """Draw the end of a name, if it is too long."""
        font = self.small_font
        text = drawable_text(name, font)
        text = fitting_end(text, self.column_width, font)
        self.pen.text((x, y), text, fill=NAME_COLOR, font=font)

    def _draw_caption(self, x: int, y: int, caption: str) -> None:
        """Draw a caption in several lines, or a note if it is empty."""
        text = drawable_text(caption, self.font)
        lines = ""
        if caption:
            lines = wrapped_text(text, self.column_width, self.font, MAX_CAPTION_LINES)
        self.pen.multiline_text(
            (x, y),
            lines or "(no caption)",
            fill="black" if lines else MISSING_COLOR,
            font=self.font,
            spacing=2,
        )


def sheet_png(title: str, tiles: list[Tile]) -> bytes:
    """Return a sheet as a PNG."""
    buffer = io.BytesIO()
    sheet = Sheet(title, tiles)
    sheet.page.save(buffer, format="PNG")
    return buffer.getvalue()


def drawable_text(text: str, font: Any) -> str:
    """Return a text in one line that the font can draw."""
    line = one_line(text, MAX_TEXT_LENGTH)
    try:
        font.getlength(line)
    except UnicodeEncodeError:  # Pillow's font without FreeType
        ascii_bytes = line.encode("ascii", "replace")
        return ascii_bytes.decode()
    return line


def fitting_end(text: str, width: int, font: Any) -> str:
    """Return the end of a text that fits into `width` pixels.

    The end of a path says most."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"
