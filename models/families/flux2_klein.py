"""FLUX.2 klein, 4B and 9B, base and distilled (Black Forest Labs 2026).

See https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence. It is FLUX.2 with three
layers of Qwen3 as conditioning and without guidance.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from models.comfy_nodes import ComfyGuidance, ComfyNodes, cfg_guidance
from models.families.flux2 import GUIDANCE_KEY, MODULATION_KEY, Flux2Family

WIDTH_4B = 7680
"""Width of the conditioning of 4B: three layers of Qwen3 4B."""


class Flux2Klein(Flux2Family):
    """FLUX.2 klein. Its padding is after the caption, and no two embeddings of it are equal.

    So 512 tokens are stored for each caption."""

    name = "flux2_klein"
    pipelines = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline")
    text_layers = (9, 18, 27)
    undistilled_model = "the base model of its size (black-forest-labs/FLUX.2-klein-base-4B or -9B)"
    comfy_widths: ClassVar = {WIDTH_4B: "FLUX.2 klein 4B", 12288: "FLUX.2 klein 9B"}

    @property
    def comfy_nodes(self) -> ComfyNodes:  # type: ignore[override]
        is_4b = self.cond_width <= WIDTH_4B
        text_encoder = "qwen_3_4b.safetensors" if is_4b else "qwen_3_8b_fp8mixed.safetensors"
        return ComfyNodes(
            text_encoders=(text_encoder,),
            text_encoder_type="flux2",
            vae="flux2-vae.safetensors",
            latents="EmptyFlux2LatentImage",
            has_size_scheduler=True,
        )

    @property
    def is_distilled(self) -> bool:
        return bool(self.files.pipeline_config.get("is_distilled", False))

    def comfy_guidance(self, scale: float) -> ComfyGuidance:
        return ComfyGuidance(1.0) if self.is_distilled else cfg_guidance(scale)

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return MODULATION_KEY in shapes and GUIDANCE_KEY not in shapes

    def find_source(self) -> str:
        # diffusers detects every FLUX.2 file as dev; base and distilled have one configuration
        width = self.files.denoiser_shapes["txt_in.weight"][1]
        size = "4B" if width == WIDTH_4B else "9B"
        return f"black-forest-labs/FLUX.2-klein-base-{size}"

    def num_template_tokens(self) -> int:
        messages = [{"role": "user", "content": ""}]
        tokens = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=True
        )
        return len(tokens["input_ids"])

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return self.variant_metadata("klein-4b" if self.cond_width <= WIDTH_4B else "klein-9b")


FAMILY = Flux2Klein
