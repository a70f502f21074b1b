"""Chroma (Lodestone Rock 2025): FLUX.1 schnell, smaller, not distilled, without a pooled embedding.

Its text padding is masked, except one token after each caption: the model was trained to see it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from models.base import base_metadata
from models.comfy_nodes import ComfyNodes
from models.families.flux1 import BLOCK_KEYS, TOKENS, FluxFamily
from models.families.flux_names import FLUX_TABLE
from models.families.transformer_family import T5_PREFIX
from models.layer_names.tables import TableNames


def mask_padding(pipeline: Any) -> None:
    """Make diffusers' pipeline hide padding.

    Its masks are numbers, which attention adds to its scores instead (huggingface/diffusers issues
    12116 and 13619)."""
    prepare = pipeline._prepare_attention_mask

    def prepare_bool_mask(*args: Any, **options: Any) -> Tensor | None:
        mask = prepare(*args, **options)
        return None if mask is None else mask.bool()

    pipeline._prepare_attention_mask = prepare_bool_mask


class Chroma(FluxFamily):
    """Chroma. All tokens of ComfyUI's conditioning count: those of the caption, and its padding."""

    name = "chroma"
    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline")
    denoiser_class = "ChromaTransformer2DModel"
    file_prefixes: ClassVar = {**FluxFamily.file_prefixes, "text_encoder": T5_PREFIX}
    layer_names = TableNames(table=FLUX_TABLE, original_only=r"distilled_guidance_layer\..*")
    max_tokens = TOKENS
    comfy_widths: ClassVar = {4096: "Chroma"}
    comfy_nodes = ComfyNodes(
        text_encoders=("t5xxl_fp16.safetensors",),
        text_encoder_type="chroma",
        vae="ae.safetensors",
        shift="ModelSamplingAuraFlow",
        text_padding=1,
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return BLOCK_KEYS | {"distilled_guidance_layer.in_proj.weight"} <= shapes.keys()

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, _, masks, *_ = encoders.encode_prompt(
            captions,
            device=encoders._execution_device,
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
        )
        return [
            {"prompt_embeds": embed[mask.bool()]} for embed, mask in zip(embeds, masks, strict=True)
        ]

    def adapt_denoiser(self, denoiser: nn.Module) -> None:
        from models.families.chroma_attention import hide_keys_alone

        hide_keys_alone(denoiser)

    def denoiser_arguments(self, tokens: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
        return {"attention_mask": self.mask(tokens.shape[1], cond)}

    def pipeline(self, denoiser: nn.Module | None, with_text_encoders: bool = True) -> Any:
        pipeline = super().pipeline(denoiser, with_text_encoders)
        mask_padding(pipeline)
        return pipeline

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("chroma", "chroma")


FAMILY = Chroma
