"""Z-Image: a transformer over image and caption in one stream of tokens (Tongyi-MAI 2025, arXiv
2511.22699), with Qwen3 as text encoder.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import base_metadata
from models.families.qwen_text_family import QwenTextFamily
from models.layer_names.transformers import Z_IMAGE

TOKENS = 512  # the pipeline's default
ATTENTION = r".*\.attention\.to_(q|k|v|out\.0)"


class ZImage(QwenTextFamily):
    """Conditioning is the encoder's last state but one, of the caption and the marks of the chat
    around it."""

    name = "z_image"
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    denoiser_class = "ZImageTransformer2DModel"
    latent_shift, latent_scale = 0.1159, 0.3611
    names = Z_IMAGE
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|.*\.feed_forward\.w[123]",
        "all": r".*",
    }
    most_tokens, cond_width_name = TOKENS, "cap_feat_dim"

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {
            "cap_pad_token",
            "layers.0.attention.qkv.weight",
            "layers.0.adaLN_modulation.0.weight",
        } <= shapes.keys()

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders.text_encoder.device
        own = [*captions]  # the pipeline writes into the list
        embeds, _ = encoders.encode_prompt(own, device, False, max_sequence_length=TOKENS)
        return [{"prompt_embeds": embed} for embed in embeds]

    def marks(self) -> str:
        messages = [{"role": "user", "content": ""}]
        return self.counting_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        captions = [
            embed[:count]
            for embed, count in zip(cond["prompt_embeds"], cond["lengths"], strict=True)
        ]
        images = list(noisy.unsqueeze(2).unbind())  # each a video of one frame
        found = denoiser(images, (1000 - timestep) / 1000, captions, return_dict=False)[0]
        return -torch.stack(found).squeeze(2)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        # as the model's authors count it: 0 is without guidance, 1 what others call 2
        return {"guidance_scale": guidance_scale, "max_sequence_length": TOKENS}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image")


FAMILY = ZImage
