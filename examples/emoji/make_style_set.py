"""Writes the demo's training and validation images: Twemoji faces with captions, from the npm
package.

    npm install --prefix WORK emoji-datasource-twitter
    python examples/emoji/make_style_set.py --work WORK

The captions are those by which the base model knows the same faces in Noto's style.
"""

import argparse
import shutil
from pathlib import Path

from emoji_source import flatten, read_emoji
from PIL import Image

TRAIN = (
    "grinning",
    "grin",
    "joy",
    "smiley",
    "smile",
    "sweat_smile",
    "laughing",
    "innocent",
    "wink",
    "yum",
    "relieved",
    "sunglasses",
    "neutral_face",
    "expressionless",
    "unamused",
    "sweat",
    "pensive",
    "confused",
    "kissing",
    "stuck_out_tongue",
    "disappointed",
    "worried",
    "cry",
    "triumph",
    "anguished",
    "fearful",
    "weary",
    "sleepy",
    "grimacing",
    "open_mouth",
    "flushed",
    "no_mouth",
)
VALIDATION = (
    "heart_eyes",
    "stuck_out_tongue_winking_eye",
    "blush",
    "slightly_frowning_face",
    "hushed",
    "smirk",
    "sob",
    "slightly_smiling_face",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with node_modules")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "twemoji")
    args = parser.parse_args()
    emoji = {e.name: e for e in read_emoji(args.work / "node_modules", "twitter")}
    for split, names in (("train", TRAIN), ("validation", VALIDATION)):
        folder = args.out / split
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in names:
            flatten(Image.open(emoji[name].path)).save(folder / f"{name}.png", optimize=True)
            (folder / f"{name}.txt").write_text(emoji[name].caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
