"""What is adapted. Imports nothing of ours; importing this page imports no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.base import ModelFamily
    from models.config import ModelConfig

FAMILIES: dict[str, str] = {
    "sd15": "models.sd15",
    "sdxl": "models.sdxl",
    "sd3": "models.sd3",
    "flux1": "models.flux1",
    "chroma": "models.chroma",
    "qwen_image": "models.qwen_image",
    "z_image": "models.z_image",
    "flux2": "models.flux2",
    "flux2_klein": "models.flux2_klein",
    "wan": "models.wan",
    "wan_i2v": "models.wan_i2v",
}
"""`--model.family` -> the module that implements it: a new family is one file, one line here and a recipe."""


def get_family(config: "ModelConfig") -> "ModelFamily":
    """The family of the model at `config`'s path, bound to it. ModelError if it is none, or not the one named."""
    from models.config import ModelError
    from models.detect import family_of

    family = family_of(config)(config)
    if config.expert is not None and not family.has_experts:
        raise ModelError(f"--model.expert = {config.expert}: {config.path} has one denoiser; {family.without_experts}")
    family.check()
    return family
