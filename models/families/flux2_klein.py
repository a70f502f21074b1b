"""FLUX.2 klein, 4B and 9B, base and distilled (Black Forest Labs 2026,
https://bfl.ai/blog/flux2-klein-towards-interactive-visual-intelligence): FLUX.2 with three layers
of Qwen3 as conditioning and without guidance."""

from collections.abc import Mapping

from torch import nn

from models.families.flux2 import Flux2Family

SMALL = 7680  # width of conditioning of 4B: three layers of Qwen3 4B


class Flux2Klein(Flux2Family):
    """Of padding, which stands behind the caption, no two tokens are alike: 512 tokens are stored
    per caption."""

    name = "flux2_klein"
    pipelines = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline")

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return (
            "double_stream_modulation_img.lin.weight" in shapes
            and "guidance_in.in_layer.weight" not in shapes
        )

    def _config_of_file(self) -> str:
        width = self.stored_shapes[f"{self.stored_prefix}txt_in.weight"][1]
        # diffusers takes every FLUX.2 file for dev; base and distilled have one configuration
        return f"black-forest-labs/FLUX.2-klein-base-{'4B' if width == SMALL else '9B'}"

    def frame(self) -> int:
        messages = [{"role": "user", "content": ""}]
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": True}
        return len(self.counting_tokenizer.apply_chat_template(messages, **options)["input_ids"])

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return self.model_metadata("klein-4b" if self.cond_width <= SMALL else "klein-9b")


FAMILY = Flux2Klein
