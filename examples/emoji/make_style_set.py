"""Writes the images of the two demos: Noto emoji in two print styles, with the base models'
captions.

    npm install --prefix WORK emoji-datasource-google
    python examples/emoji/make_style_set.py --work WORK

A style has 160 training images and 12 validation images of other subjects.
"""

import argparse
import random
import shutil
from pathlib import Path

from emoji_source import Emoji, read_emoji
from restyle import ScreenPrint

STYLES = {
    "screen_print": ScreenPrint(),
    "blue_tile": ScreenPrint(
        inks=((16, 42, 110), (30, 110, 190), (120, 190, 230), (225, 243, 250)),
        paper=(255, 255, 255),
        border=(255, 255, 255),
        border_width=3,
    ),
}
NUM_TRAINING = 160
VALIDATION_NAMES = (
    "tiger", "octopus", "penguin", "cactus", "pizza", "strawberry", "icecream", "ghost",
    "sunglasses", "owl", "doughnut", "tropical_fish",
)  # fmt: skip
"""Subjects that are easy to recognize. The first six are shown in the README."""
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with node_modules")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    emoji = read_emoji(options.work / "node_modules", "google")
    training, validation = split(emoji)
    for style in STYLES:
        write_images(training, style, options.out / style / "train")
        write_images(validation, style, options.out / style / "validation")


def split(emoji: list[Emoji]) -> tuple[list[Emoji], list[Emoji]]:
    """Return the training and the validation subjects. No caption is in both."""
    validation = [item for item in emoji if item.name in VALIDATION_NAMES]
    held_out_captions = {item.caption for item in validation}
    others = [item for item in emoji if item.caption not in held_out_captions]
    training = random.Random(SEED).sample(others, NUM_TRAINING)
    return training, validation


def write_images(emoji: list[Emoji], style: str, folder: Path) -> None:
    """Write the restyled images and their captions into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for item in emoji:
        image = STYLES[style](item.image())
        image.save(folder / f"{item.name}.png", optimize=True)
        (folder / f"{item.name}.txt").write_text(f"{item.caption}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
