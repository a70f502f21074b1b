"""Draws the picture of a demo in the README: captions of the validation images, before and after.

    python examples/emoji/draw_demo.py --base examples/emoji/base --style screen_print \\
        --run output/demo --out demo.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from diffusers import DiffusionPipeline
from make_style_set import VALIDATION_NAMES
from PIL import Image

from common.atomic import write_file
from training.reporting.image_grid import grid_png

NUM_SHOWN = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--style", required=True, help="folder with train and validation")
    parser.add_argument("--run", type=Path, required=True, help="output folder of the training")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--names", help="images to show, separated by commas; default: the first 6")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    options = parser.parse_args()
    folder = Path(__file__).parent / options.style / "validation"
    names: Sequence[str] = VALIDATION_NAMES[:NUM_SHOWN]
    if options.names:
        names = options.names.split(",")
    captions = [(folder / f"{name}.txt").read_text(encoding="utf-8").strip() for name in names]
    pipeline = DiffusionPipeline.from_pretrained(options.base, dtype=torch.float32)
    before = draw(pipeline, captions, options.guidance_scale)
    pipeline.load_lora_weights(str(options.run), weight_name="lora.safetensors")
    after = draw(pipeline, captions, options.guidance_scale)
    real = [np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) / 255 for name in names]
    rows = {"before": before, "after": after, "held-out": np.stack(real)}
    write_file(options.out, grid_png(rows, captions))


def draw(pipeline: DiffusionPipeline, captions: list[str], guidance_scale: float) -> np.ndarray:
    """Return (N, 64, 64, 3) in [0, 1]. Each caption has its own noise."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(len(captions))]
    return pipeline(
        list(captions),  # Z-Image writes its template into the list
        num_inference_steps=50, guidance_scale=guidance_scale, output_type="np",
        height=64, width=64, generator=generators,
    ).images  # fmt: skip


if __name__ == "__main__":
    main()
