"""A family as short as a family can be: AuraFlow (fal.ai 2024), whose classes diffusers has.

The names of its layers in a single file are invented, with one fused weight."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from models.base import base_metadata
from models.families.transformer_family import ATTENTION, TransformerFamily
from models.layer_names.tables import Rule, TableNames, fused_qkv


class Toy(TransformerFamily):
    name = "toy"
    pipelines = ("AuraFlowPipeline",)
    denoiser_class = "AuraFlowTransformer2DModel"
    latent_channels = 4
    max_tokens = 256
    layer_names = TableNames(
        table=(
            Rule(r"joint_transformer_blocks\.(\d+)\.attn\.", r"blocks.\1.", fused_qkv("", "qkv")),
        )
    )
    targets: ClassVar = {"attention": ATTENTION, "all": r".*"}
    comfy_widths: ClassVar = {40: "Toy"}

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {"register_tokens", "blocks.0.qkv.weight"} <= shapes.keys()

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders.text_encoder.device
        embeds, *_ = encoders.encode_prompt(
            captions, do_classifier_free_guidance=False, device=device
        )
        return [{"prompt_embeds": embed} for embed in embeds]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        return denoiser(noisy, cond["prompt_embeds"], timestep / 1000, return_dict=False)[0]

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("toy", "toy")


FAMILY = Toy
