"""Qwen-Image: a transformer over the tokens of a caption and of an image (Qwen team 2025, arXiv
2508.02324), with Qwen2.5-VL as text encoder and a VAE for videos, of which an image is one frame.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from models.base import base_metadata, with_frames
from models.families.packing import PATCH, pack, unpack
from models.families.qwen_text_family import QwenTextFamily
from models.families.transformer_family import ATTENTION
from models.layer_names.transformers import QWEN_IMAGE

TOKENS = 1024  # the pipeline's limit
AFTER_CAPTION = "<|im_end|>\n<|im_start|>assistant\n"  # of the pipeline's template


class QwenImage(QwenTextFamily):
    """Conditioning is the encoder's last state, without the tokens of the template before the
    caption."""

    name = "qwen_image"
    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    denoiser_class = "QwenImageTransformer2DModel"
    vae_class = "AutoencoderKLQwenImage"
    in_file: ClassVar = {}
    names = QWEN_IMAGE
    comfy_frames = True
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|.*\.(img|txt)_mlp\.net\.(0\.proj|2)",
        "all": r".*",
    }
    most_tokens, cond_width_name = TOKENS, "joint_attention_dim"

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {"txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"} <= shapes.keys()

    def _config_of_file(self) -> str:
        return "Qwen/Qwen-Image"  # diffusers would take the file for Stable Diffusion 1's

    def latent_step(self) -> int:
        return 2 ** len(self.vae_config["temperal_downsample"])  # diffusers' spelling

    def encode_media(self, encoders: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super().encode_media(encoders, with_frames(pixels, True))
        return with_frames(mean, False), with_frames(deviation, False)

    def decode_media(self, encoders: Any, latents: Tensor) -> Tensor:
        return with_frames(super().decode_media(encoders, with_frames(latents, True)), False)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders.text_encoder.device
        embeds, mask = encoders.encode_prompt(captions, device, max_sequence_length=TOKENS)
        counts = [embeds.shape[1]] * len(embeds) if mask is None else mask.sum(1).tolist()
        return [
            {"prompt_embeds": embed[:count].clone()}
            for embed, count in zip(embeds, counts, strict=True)
        ]

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        blocks: Any = denoiser.transformer_blocks
        last = f"transformer_blocks.{len(blocks) - 1}"  # what it makes of the text goes nowhere
        return [f"{last}.attn.to_add_out", f"{last}.txt_mlp"]

    def marks(self) -> str:
        return AFTER_CAPTION

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        alike = (
            len(set(cond["lengths"])) == 1
        )  # no mask: attention is faster, and nothing is copied to the device
        tokens = denoiser(
            hidden_states=pack(noisy),
            timestep=timestep / 1000,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_hidden_states_mask=None if alike else cond["attention_mask"],
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        # without a negative prompt the pipeline takes no notice of the scale
        return {
            "true_cfg_scale": guidance_scale,
            "negative_prompt": " ",
            "max_sequence_length": TOKENS,
        }

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image")


FAMILY = QwenImage
