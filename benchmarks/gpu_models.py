"""Models of true shape with random weights, and their inputs, for benchmarks/gpu.py."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

KEYS = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "keys"
WEIGHT_STD = 0.02
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A denoiser, and how it is called."""

    name: str
    """Name of its configuration in tests/fixtures/keys."""
    family: str
    inputs: Callable[[Any, int, int, torch.device], Inputs]
    """(config, batch size, side of the image in pixels, device) -> arguments of the denoiser."""
    tiny: dict[str, Any] = field(default_factory=dict)
    """Changes of the configuration for a quick test."""

    def build(self, device: torch.device, is_tiny: bool) -> nn.Module:
        """Return the frozen denoiser in bf16, with random weights."""
        facts = json.loads(gzip.decompress((KEYS / f"{self.name}.json.gz").read_bytes()))
        config = facts["config"] | (self.tiny if is_tiny else {})
        with torch.device("meta"):
            denoiser = getattr(diffusers, facts["class"])(**config)
        denoiser = denoiser.to(torch.bfloat16).to_empty(device=device)
        fill(denoiser)
        return denoiser.requires_grad_(False).train()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Set matrices to random numbers, other weights to 1, biases and buffers to 0."""
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            tensor.normal_(std=WEIGHT_STD)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.fill_(1)
    for buffer in model.buffers():
        buffer.zero_()


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def positions(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """Return (height * width, axes): row and column of each token in axes 1 and 2."""
    ids = torch.zeros(height, width, axes, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.flatten(0, 1)


def sdxl_inputs(config: Any, batch: int, side: int, device: torch.device) -> Inputs:
    latent = side // 8
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": random(batch, config.in_channels, latent, latent, device=device),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": random(batch, 77, config.cross_attention_dim, device=device),
        "added_cond_kwargs": {
            "text_embeds": random(batch, pooled, device=device),
            "time_ids": torch.full((batch, 6), side, device=device),
        },
    }


def flux1_inputs(config: Any, batch: int, side: int, device: torch.device) -> Inputs:
    rows = side // 16
    return {
        "hidden_states": random(batch, rows * rows, config.in_channels, device=device),
        "timestep": torch.full((batch,), 0.5, device=device),
        "guidance": torch.full((batch,), 1.0, device=device),
        "encoder_hidden_states": random(batch, 512, config.joint_attention_dim, device=device),
        "pooled_projections": random(batch, config.pooled_projection_dim, device=device),
        "txt_ids": torch.zeros(512, 3, device=device),
        "img_ids": positions(rows, rows, 3, device),
    }


def flux2_inputs(config: Any, batch: int, side: int, device: torch.device) -> Inputs:
    rows = side // 16
    text_ids = torch.zeros(512, 4, device=device)
    text_ids[:, 3] = torch.arange(512, device=device)
    return {
        "hidden_states": random(batch, rows * rows, config.in_channels, device=device),
        "timestep": torch.full((batch,), 0.5, device=device),
        "guidance": None,
        "encoder_hidden_states": random(batch, 512, config.joint_attention_dim, device=device),
        "txt_ids": text_ids,
        "img_ids": positions(rows, rows, 4, device),
    }


def z_image_inputs(config: Any, batch: int, side: int, device: torch.device) -> Inputs:
    latent = side // 8
    images = [random(config.in_channels, 1, latent, latent, device=device) for _ in range(batch)]
    captions = [random(128, config.cap_feat_dim, device=device) for _ in range(batch)]
    return {
        "x": images,
        "t": torch.full((batch,), 0.5, device=device),
        "cap_feats": captions,
    }


MODELS = {
    model.name: model
    for model in (
        Model(
            "flux2_klein_4b", "flux2_klein", flux2_inputs,
            {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
             "joint_attention_dim": 48, "axes_dims_rope": (8, 8, 8, 8)},
        ),
        Model(
            "z_image", "z_image", z_image_inputs,
            {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
             "cap_feat_dim": 48, "axes_dims": [8, 12, 12]},
        ),
        Model(
            "flux", "flux1", flux1_inputs,
            {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
             "joint_attention_dim": 48, "pooled_projection_dim": 24, "axes_dims_rope": (8, 12, 12)},
        ),
        Model(
            "sdxl", "sdxl", sdxl_inputs,
            {"block_out_channels": [32, 64, 64], "transformer_layers_per_block": [1, 1, 1],
             "cross_attention_dim": 48, "attention_head_dim": [2, 2, 2],
             "projection_class_embeddings_input_dim": 6 * 256 + 32},
        ),
    )
}  # fmt: skip
