"""The model families: what is adapted. Importing this module imports no torch."""

from importlib import import_module
from typing import Any

FAMILIES: dict[str, str] = {
    "sd15": "models.families.sd15",
    "sd15_inpaint": "models.families.sd15_inpaint",
    "sdxl": "models.families.sdxl",
    "sdxl_inpaint": "models.families.sdxl_inpaint",
    "sd3": "models.families.sd3",
    "flux1": "models.families.flux1",
    "flux1_fill": "models.families.flux1_fill",
    "flux1_kontext": "models.families.flux1_kontext",
    "chroma": "models.families.chroma",
    "qwen_image": "models.families.qwen_image",
    "qwen_image_edit": "models.families.qwen_image_edit",
    "qwen_image_edit_plus": "models.families.qwen_image_edit_plus",
    "qwen_image_21": "models.families.qwen_image_21",
    "z_image": "models.families.z_image",
    "z_image_omni": "models.families.z_image_omni",
    "krea2": "models.families.krea2",
    "anima": "models.families.anima",
    "ernie_image": "models.families.ernie_image",
    "ideogram4": "models.families.ideogram4",
    "flux2": "models.families.flux2",
    "flux2_klein": "models.families.flux2_klein",
    "flux3": "models.families.flux3",
    "wan": "models.families.wan",
    "wan_i2v": "models.families.wan_i2v",
    "ltx2": "models.families.ltx2",
    "hunyuan_video15": "models.families.hunyuan_video15",
}
"""`--model.family` -> the module that implements it. To add a family, write its file and a recipe,
and add a line here."""


def family_classes() -> dict[str, type[Any]]:
    """Return the class of every family. Imports all of them, and torch."""
    return {name: import_module(module).FAMILY for name, module in FAMILIES.items()}
