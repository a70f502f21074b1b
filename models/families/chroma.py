"""Chroma (Lodestone Rock 2025): FLUX.1 schnell, smaller and undistilled, without pooled text; text
padding is masked.

The model was trained to see one token of padding after each caption, and is given it here.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from models.base import base_metadata, check_comfy_cond
from models.checkpoint_files import T5
from models.families.flux1 import BLOCKS, TOKENS, FluxFamily
from models.layer_names.transformers import CHROMA_NATIVE_ONLY


def mask_padding(pipeline: Any) -> None:
    """Makes diffusers' pipeline hide padding: its masks are numbers, which attention adds to its scores instead
    (huggingface/diffusers issues 12116 and 13619)."""
    prepare = pipeline._prepare_attention_mask

    def prepared(*args: Any, **options: Any) -> Tensor | None:
        mask = prepare(*args, **options)
        return None if mask is None else mask.bool()

    pipeline._prepare_attention_mask = prepared


class Chroma(FluxFamily):
    """ComfyUI's conditioning has the caption's tokens, and what padding it was told to add: all of
    them count."""

    name = "chroma"
    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline")
    denoiser_class = "ChromaTransformer2DModel"
    unused = ("feature_extractor", "image_encoder")
    in_file: ClassVar = {**FluxFamily.in_file, "text_encoder": (T5,)}
    native_only = CHROMA_NATIVE_ONLY

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return BLOCKS | {"distilled_guidance_layer.in_proj.weight"} <= shapes.keys()

    @property
    def _width(self) -> int:
        return self.denoiser_config["joint_attention_dim"]

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, _, masks, *_ = encoders.encode_prompt(
            captions,
            device=encoders.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
        )
        return [
            {"prompt_embeds": embed[mask.bool()]} for embed, mask in zip(embeds, masks, strict=True)
        ]

    def cond_bytes(self) -> int:
        return TOKENS * self._width * self._text_dtype("text_encoder").itemsize

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        check_comfy_cond(cond, self._width)
        return {"prompt_embeds": cond[0]}

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return cond["prompt_embeds"][None], {"pooled_output": None}

    def inputs(self, noisy: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
        return {"attention_mask": self.mask(noisy, cond)}

    def pipeline(self, denoiser: nn.Module | None) -> Any:
        found = super().pipeline(denoiser)
        mask_padding(found)
        return found

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("chroma", "chroma")


FAMILY = Chroma
