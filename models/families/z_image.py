"""Z-Image (Tongyi-MAI 2025, arXiv 2511.22699): a transformer over one stream of image and caption.

Its text encoder is Qwen3.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import base_metadata
from models.comfy import ComfyLayout, MaskedLayout
from models.comfy_nodes import ComfyNodes
from models.families.transformer_family import TransformerFamily
from models.layer_names.tables import Names, Rule, TableNames, fused_qkv

TOKENS = 512
"""The pipeline's default, with the tokens of the template."""
ATTENTION = r".*\.attention\.to_(q|k|v|out\.0)"
ATTENTION_NAMES: Names = {
    **fused_qkv("", "qkv"),
    "to_out.0": "out",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
EMBEDDER: Names = {"": "", ".linear": ".linear", ".adaLN_modulation.1": ".adaLN_modulation.1"}
TABLE = (
    Rule(
        r"(noise_refiner|context_refiner|siglip_refiner|layers)\.(\d+)\.attention\.",
        r"\1.\2.attention.",
        ATTENTION_NAMES,
    ),
    Rule(r"all_(x_embedder|final_layer)\.[\d-]+", r"\1", EMBEDDER),
)


Z_IMAGE_KEYS = {
    "cap_pad_token",
    "layers.0.attention.qkv.weight",
    "layers.0.adaLN_modulation.0.weight",
}
SIGLIP_KEY = "siglip_embedder.1.weight"
"""A tensor of the omni model alone."""


class ZImage(TransformerFamily):
    """Conditioning is the encoder's last state but one, of the caption in a chat template."""

    name = "z_image"
    undistilled_model = "Z-Image (Tongyi-MAI/Z-Image)"
    pipelines: ClassVar[tuple[str, ...]] = (
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
    )
    denoiser_class = "ZImageTransformer2DModel"
    latent_shift = 0.1159
    latent_scale = 0.3611
    layer_names = TableNames(table=TABLE)
    variable_length: ClassVar = {"prompt_embeds": None}
    max_tokens = TOKENS
    neutral_guidance = 0.0  # 1 is 2 in other models
    cond_width_key = "cap_feat_dim"
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|.*\.feed_forward\.w[123]",
        "all": r".*",
    }
    comfy_widths: ClassVar = {2560: "Z-Image"}
    comfy_nodes: ComfyNodes | None = ComfyNodes(
        text_encoders=("qwen_3_4b.safetensors",),
        text_encoder_type="lumina2",
        vae="ae.safetensors",
        shift="ModelSamplingAuraFlow",
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return shapes.keys() >= Z_IMAGE_KEYS and SIGLIP_KEY not in shapes

    @cached_property
    def comfy(self) -> ComfyLayout:
        return MaskedLayout(self.cond_width)

    def num_template_tokens(self) -> int:
        messages = [{"role": "user", "content": ""}]
        template = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return super().num_template_tokens() + len(self.tokenizer(template).input_ids)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders._execution_device
        embeds, _ = encoders.encode_prompt(
            list(captions),  # the pipeline writes into the list
            device,
            do_classifier_free_guidance=False,
            max_sequence_length=TOKENS,
        )
        return [{"prompt_embeds": embed} for embed in embeds]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        captions = [
            embed[:count]
            for embed, count in zip(cond["prompt_embeds"], cond["lengths"], strict=True)
        ]
        images = list(noisy.unsqueeze(2).unbind())  # each is a video of one frame
        predictions = denoiser(images, (1000 - timestep) / 1000, captions, return_dict=False)[0]
        return -torch.stack(predictions).squeeze(2)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale, "max_sequence_length": TOKENS}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image")


FAMILY = ZImage
