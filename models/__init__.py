"""What is adapted. Imports nothing of ours; importing this page imports no torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.base import ModelFamily
    from models.config import ModelConfig

FAMILIES: dict[str, str] = {
    "sd15": "models.families.sd15",
    "sdxl": "models.families.sdxl",
    "sd3": "models.families.sd3",
    "flux1": "models.families.flux1",
    "chroma": "models.families.chroma",
    "qwen_image": "models.families.qwen_image",
    "z_image": "models.families.z_image",
    "flux2": "models.families.flux2",
    "flux2_klein": "models.families.flux2_klein",
    "wan": "models.families.wan",
    "wan_i2v": "models.families.wan_i2v",
}
"""`--model.family` -> the module that implements it: a new family is one file, one line here and a
recipe."""


def get_family(config: "ModelConfig") -> "ModelFamily":
    """The family of the model at `config`'s path, bound to it. ModelError if it is none, or not the
    one named."""
    from common.errors import ModelError
    from models.detect import family_of

    family = family_of(config)(config)
    if config.expert is not None and not family.has_experts:
        raise ModelError(
            f"--model.expert = {config.expert}: {config.path} has one denoiser; {family.without_experts}"
        )
    family.check()
    return family
