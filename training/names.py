"""How adapter files name the layers of a family's model."""

from torch import nn

from lora_algos.formats import Names
from models.base import ModelFamily


def file_names(family: ModelFamily, denoiser: nn.Module) -> Names:
    """`denoiser` may be without values."""
    return Names(family.native_names(denoiser), family.component, family.kohya_is_native)
