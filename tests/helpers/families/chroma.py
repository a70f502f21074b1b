"""A tiny Chroma pipeline."""

from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from helpers.families.flux1 import VAE, WIDTHS, unpack
from helpers.family_cases import Case
from helpers.tiny_models import image_vae, t5_encoder, t5_tokenizer
from models.families.chroma import mask_padding


def make() -> ChromaPipeline:
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            **WIDTHS, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=2
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=image_vae(16, **VAE),
        text_encoder=t5_encoder(), tokenizer=t5_tokenizer(),
    )  # fmt: skip


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """T5's tokens, after which ComfyUI was told to put one of padding (T5TokenizerOptions), which they do not see."""
    ids = pipeline.tokenizer(caption, return_tensors="pt").input_ids
    mask = torch.ones(1, ids.shape[1] + 1)
    mask[0, -1] = 0
    padded = torch.nn.functional.pad(ids, (0, 1), value=pipeline.tokenizer.pad_token_id)
    return pipeline.text_encoder(padded, attention_mask=mask)[0], {"pooled_output": None}


CASE = Case("chroma", make, {"guidance_scale": 1.0}, unpack, comfy=comfy, repair=mask_padding)
