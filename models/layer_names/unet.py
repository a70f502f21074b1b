"""Names of a UNet's modules in the original Stable Diffusion code (LDM, sgm), from diffusers'
names: ComfyUI's own names.

`down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`, for any number of levels and of
layers per level.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

OUTSIDE = {
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
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def native_names(unet: nn.Module) -> dict[str, str]:
    """diffusers name -> original name, of every module of `unet` with a weight of its own."""
    blocks = {**OUTSIDE, **dict(block_names(unet))}
    names = {}
    for name, module in unet.named_modules():
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        prefix = name
        while prefix and prefix not in blocks:
            prefix = prefix.rpartition(".")[0]
        if not prefix:
            continue
        rest = name[len(prefix) + 1 :]
        if ".resnets." in f".{prefix}":
            rest = IN_RESNET.get(rest, rest)
        names[name] = f"{blocks[prefix]}.{rest}".removesuffix(".")
    return names


def block_names(unet: Any) -> Iterator[tuple[str, str]]:
    """The parts of the blocks on the way down and up: the original numbers all layers of all levels
    in one row."""
    place = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{place}.0"
            yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{place}.1"
            place += 1
        if block.downsamplers:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
            place += 1
    place = 0
    for level, block in enumerate(unet.up_blocks):
        attends = bool(getattr(block, "attentions", None))
        for layer in range(len(block.resnets)):
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{place}.0"
            yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{place}.1"
            place += 1
        if block.upsamplers:
            # the last part of the level's last layer
            yield (
                f"up_blocks.{level}.upsamplers.0.conv",
                f"output_blocks.{place - 1}.{1 + attends}.conv",
            )
