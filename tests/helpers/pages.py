"""The documentation's code blocks, and a folder in which its commands run as a user runs them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from helpers.project import BASE, PROJECT, TWEMOJI

DEMO_MODEL = "examples/emoji/base"
LINKED = ("accelerate_configs", "docs", "examples", "recipes")
SHORT_RUN = [
    "--steps=2",
    "--data.resolution=64",
    "--batch_size=1",
    "--data.num_workers=0",
    "--no_preview",
    "--sample.num_inference_steps=1",
]
"""Options that shorten a run of a command on a page."""


def page(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page(name), re.DOTALL)


def commands(name: str) -> list[str]:
    """Return the shell commands on a page, without comments."""
    lines = []
    for block in blocks(name, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split(" #")[0].strip()
            if command:
                lines.append(command)
    return lines


def words_of(command: str) -> list[str]:
    """Split a command into words, with the embedded model and images for <model> and <folder>."""
    model = str(BASE)
    for family in ("flux1_kontext", "flux1_fill", "z_image"):
        if f"recipes/{family}.yaml" in command:
            from helpers.family_cases import cases, folder_of  # a slow import

            case = next(case for case in cases() if case.family == family)
            model = str(folder_of(case))
    command = command.replace("<model>", model).replace("<folder>", str(TWEMOJI / "train"))
    command = command.replace("recipes/sdxl.yaml", "recipes/sd15.yaml")  # of the embedded model
    return shlex.split(command)


def make_workspace(folder: Path) -> None:
    """Fill a folder like a clone of the project, with the user's images and recipe of the README."""
    for name in LINKED:
        (folder / name).symlink_to(PROJECT / name)
    (folder / "my_dog").symlink_to(TWEMOJI / "train")
    make_pairs(folder / "pairs")
    make_masked(folder / "masked")
    (recipe,) = blocks("README.md", "yaml")
    values = yaml.safe_load(recipe)
    values["model"]["path"] = str(BASE)
    (folder / "my_dog.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def make_training_adapter(path: Path) -> None:
    """A LoRA of one layer of the tiny Z-Image model."""
    from helpers.families.z_image import CASE  # a slow import
    from helpers.family_cases import folder_of

    config = json.loads((folder_of(CASE) / "transformer" / "config.json").read_text())
    name, side = "transformer.layers.0.attention.to_q", config["dim"]
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, side),
        f"{name}.lora_B.weight": torch.zeros(side, 2),
    }
    save_file(tensors, path)


def make_masked(folder: Path) -> None:
    """Two images with captions and masks."""
    for name in ("grinning", "joy"):
        for suffix in (".png", ".txt"):
            copy(TWEMOJI / "train" / f"{name}{suffix}", folder / f"{name}{suffix}")
        Image.new("L", (64, 64), "white").save(folder / f"{name}_mask.png")


def make_pairs(folder: Path) -> None:
    """Two images with captions, and a folder with their control images."""
    for name in ("grinning", "joy"):
        for suffix in (".png", ".txt"):
            copy(TWEMOJI / "train" / f"{name}{suffix}", folder / "after" / f"{name}{suffix}")
        copy(TWEMOJI / "train" / f"{name}.png", folder / "before" / f"{name}.png")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
