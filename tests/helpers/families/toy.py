"""A tiny pipeline of the toy family."""

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)

from helpers.family_cases import Case
from helpers.tiny_models import image_vae, t5_tokenizer, umt5_encoder

WIDTH = 40
"""Width of the conditioning, which no other family has."""


def make() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=2, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5_encoder(WIDTH), vae=image_vae(4, scaling_factor=0.13025),
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip


CASE = Case("toy", make, {"guidance_scale": 1.0})
