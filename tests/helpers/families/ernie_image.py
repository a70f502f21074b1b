"""A tiny ERNIE-Image pipeline, with a prompt enhancer as the released models have one."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Model,
    PreTrainedTokenizerFast,
)

from helpers.families import tiny_flux2
from helpers.family_cases import Case

TEXT_LAYERS = 3
VARIANCE_OFFSET = 1e-5  # written into the pipeline


def tokenizer() -> PreTrainedTokenizerFast:
    """It begins every text with a token."""
    bytes_alone = tiny_flux2.byte_tokenizer()
    begin = bytes_alone.token_to_id("<s>")
    bytes_alone.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=2048,
    )  # fmt: skip


def make() -> ErnieImagePipeline:
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=48, rope_axes_dim=(4, 6, 6),
        text_in_dim=tiny_flux2.WIDTH,
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = Ministral3Config(
        vocab_size=len(tokenizer()), num_hidden_layers=1, rope_parameters=rope, **tiny_flux2.TEXT
    )
    enhancer = Ministral3ForCausalLM(config)
    return ErnieImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0), vae=tiny_flux2.vae(),
        text_encoder=Mistral3Model(tiny_flux2.mistral_config(TEXT_LAYERS)).eval(), tokenizer=tokenizer(),
        transformer=transformer, pe=enhancer, pe_tokenizer=tokenizer(),
    )  # fmt: skip


def comfy(pipeline: Any, caption: str) -> tuple[Tensor, dict[str, Any]]:
    """The state before the last one, without a template (comfy/text_encoders/ernie.py)."""
    tokens = pipeline.tokenizer(caption, return_tensors="pt").input_ids
    states = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states
    mask = torch.ones(1, tokens.shape[1])
    return states[TEXT_LAYERS - 1], {"pooled_output": None, "attention_mask": mask}


CASE = Case(
    "ernie_image",
    make,
    {"guidance_scale": 1.0, "use_pe": False},
    comfy=comfy,
    stored=partial(tiny_flux2.stored, offset=VARIANCE_OFFSET),
)
