"""How adapter files name the layers of a family's model."""

from torch import nn

from lora_algos.formats import Names
from models.base import ModelFamily


def file_names(family: ModelFamily, denoiser: nn.Module) -> Names:
    """`denoiser` may be without values."""
    natives = family.native_names(denoiser)
    return Names(
        {layer: native.name for layer, native in natives.items()},
        family.component.removesuffix("_2"),  # each of two denoisers has a file of its own, in which it is the one
        family.kohya_is_native,
        rows={layer: native.rows for layer, native in natives.items() if native.rows},
        swapped=frozenset(layer for layer, native in natives.items() if native.swapped),
        by_diffusers=family.by_diffusers,
        alphas=family.alphas,
        native_only=frozenset(layer for layer, native in natives.items() if not native.by_diffusers),
        text=family.text_names(denoiser),
    )
