"""Names of a UNet's layers in the original Stable Diffusion code (LDM, sgm), which are ComfyUI's.

`down_blocks.1.attentions.0.proj_in` is `input_blocks.4.1.proj_in`. The names follow from the
modules of the UNet, for any number of levels and of layers per level.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.layer_names.names import LayerNames, OriginalLayer, layers_with_weight

TOP_LEVEL_NAMES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
FILE_PREFIX = "model.diffusion_model."


@dataclass(frozen=True, kw_only=True)
class UNetNames(LayerNames):
    """Names of a UNet's layers."""

    file_formats: tuple[str, ...] = ("kohya",)

    def original(self, denoiser: nn.Module) -> dict[str, OriginalLayer]:
        names = original_names(denoiser)
        return {layer: OriginalLayer(name) for layer, name in names.items()}

    def file_keys(self, denoiser: nn.Module, keys: Collection[str]) -> dict[str, str]:
        """Return the keys of the parameters, which are the same in every single file."""
        names = original_names(denoiser)
        file_keys = {}
        for name, _ in denoiser.named_parameters():
            layer, tensor = name.rsplit(".", 1)
            original_name = names[layer]
            file_keys[name] = f"{FILE_PREFIX}{original_name}.{tensor}"
        return file_keys


def original_names(unet: nn.Module) -> dict[str, str]:
    """Return the original name of every layer of a UNet, by diffusers' name."""
    blocks = dict(TOP_LEVEL_NAMES)
    blocks.update(down_block_names(unet))
    blocks.update(up_block_names(unet))
    names = {}
    for layer in layers_with_weight(unet):
        block = containing_block(layer, blocks)
        if not block:
            continue
        remainder = layer[len(block) + 1 :]
        if ".resnets." in f".{block}":
            remainder = RESNET_NAMES.get(remainder, remainder)
        original_block = blocks[block]
        original = f"{original_block}.{remainder}"
        names[layer] = original.removesuffix(".")
    return names


def containing_block(layer: str, blocks: Collection[str]) -> str:
    """Return the block that a layer is, or is in; empty if it is in none."""
    block = layer
    while block and block not in blocks:
        parent, _, _ = block.rpartition(".")
        block = parent
    return block


def down_block_names(unet: Any) -> Iterator[tuple[str, str]]:
    """Yield diffusers' and original names of the children of the blocks on the way down.

    The original numbers the layers of all levels in one sequence, after the convolution at the
    input, which is number 0."""
    number = 1
    for level, block in enumerate(unet.down_blocks):
        name = f"down_blocks.{level}"
        for layer, _ in enumerate(block.resnets):
            yield f"{name}.resnets.{layer}", f"input_blocks.{number}.0"
            yield f"{name}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            yield f"{name}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1


def up_block_names(unet: Any) -> Iterator[tuple[str, str]]:
    """Yield diffusers' and original names of the children of the blocks on the way up.

    The upsampler of a level is the last child of its last layer."""
    number = 0
    for level, block in enumerate(unet.up_blocks):
        name = f"up_blocks.{level}"
        for layer, _ in enumerate(block.resnets):
            yield f"{name}.resnets.{layer}", f"output_blocks.{number}.0"
            yield f"{name}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:
            has_attention = bool(getattr(block, "attentions", None))
            child = 2 if has_attention else 1
            last_number = number - 1
            yield f"{name}.upsamplers.0.conv", f"output_blocks.{last_number}.{child}.conv"
