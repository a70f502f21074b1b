"""Writes a diffusers Stable Diffusion folder as one file with the original model's names (LDM), as checkpoints are
shared; for any number of levels and of layers per level.
"""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from models.layer_names.unet import original_names

VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "resnets": "block",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def save_single_file(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Writes the model in the diffusers folder `folder` to the file `path`, its weights in `dtype`."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    save_file(
        {name: tensor.contiguous() for name, tensor in ldm_state_dict(pipeline).items()}, path
    )


def ldm_state_dict(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights under their original names, and with them what else stands in Stable Diffusion 1.5's file: the noise
    schedule, in fp32 whatever the dtype of the weights, and integer positions."""
    unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder
    levels, native = len(vae.config.block_out_channels), original_names(unet)
    unet_state = {name.rpartition("."): tensor for name, tensor in unet.state_dict().items()}
    text_state = {
        name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()
    }
    text_state["embeddings.position_ids"] = torch.arange(text.config.max_position_embeddings)[None]
    return {
        "alphas_cumprod": pipeline.scheduler.alphas_cumprod,
        **{
            f"model.diffusion_model.{native[layer]}.{kind}": t
            for (layer, _, kind), t in unet_state.items()
        },
        **{
            f"first_stage_model.{vae_name(n, levels)}": vae_tensor(n, t)
            for n, t in vae.state_dict().items()
        },
        **{
            f"cond_stage_model.transformer.text_model.{name}": tensor
            for name, tensor in text_state.items()
        },
    }


def vae_name(name: str, levels: int) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` -> `decoder.up.2.block.1.conv1.weight`; up levels count down."""
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = renamed(name, VAE)
    return renamed(name, VAE_ATTENTION) if ".attn_1." in name else name


def vae_tensor(name: str, tensor: Tensor) -> Tensor:
    """The original's attention is made of 1x1 convolutions."""
    return tensor[:, :, None, None] if re.search(r"attentions\..*to_.*weight", name) else tensor


def renamed(name: str, names: dict[str, str]) -> str:
    for ours, original in names.items():
        name = name.replace(ours, original)
    return name
