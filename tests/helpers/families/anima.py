"""A tiny Anima pipeline."""

from typing import Any

from diffusers import (
    AnimaAutoBlocks,
    AnimaModularPipeline,
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from helpers.families.tiny_qwen import WIDTH, qwen3, qwen_tokenizer
from helpers.family_cases import Case, family_of
from helpers.tiny_models import t5_tokenizer
from models.families.anima import provide_resize
from models.guiders import set_guider

provide_resize()  # for diffusers' own pipeline


def make() -> AnimaModularPipeline:
    transformer = CosmosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, mlp_ratio=2.0, text_embed_dim=WIDTH,
        adaln_lora_dim=32, max_size=(4, 32, 32), rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None,
    )  # fmt: skip
    conditioner = AnimaTextConditioner(
        source_dim=WIDTH, target_dim=WIDTH, model_dim=WIDTH, num_layers=2, num_attention_heads=2, mlp_ratio=2.0,
        target_vocab_size=len(t5_tokenizer()),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True]
    )
    pipeline = AnimaAutoBlocks().init_pipeline()
    pipeline.update_components(
        transformer=transformer.eval(), text_conditioner=conditioner.eval(), vae=vae.eval(), text_encoder=qwen3(),
        tokenizer=qwen_tokenizer(), t5_tokenizer=t5_tokenizer(512),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    return pipeline


def unpack(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    return latents.squeeze(2)


def unguided(pipeline: Any) -> None:
    set_guider(pipeline, 1.0)


def conditioner(case: Case) -> dict[str, Tensor]:
    """As single files have it."""
    weights = family_of(case).load_encoders("text").text_conditioner.state_dict()
    return {f"llm_adapter.{name}": tensor for name, tensor in weights.items()}


CASE = Case("anima", make, unpack=unpack, repair=unguided, beside=conditioner)
