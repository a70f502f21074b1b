"""Krea 2 (Krea 2026), Raw and Turbo: a transformer over one stream of text and image.

Twelve layers of Qwen3-VL 4B are the conditioning, which a small transformer fuses into one. Its VAE is
that of Qwen-Image.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import TensorLayout, base_metadata
from models.blocks import find_blocks
from models.comfy import ComfyConditioning, ComfyLayout, Conditioning, MaskedLayout
from models.comfy_nodes import ComfyNodes
from models.encoder_placement import keep_first_layers
from models.families.packing import PATCH, image_ids, pack, unpack
from models.families.qwen_vae import QwenVaeFamily
from models.layer_names.tables import Names, Rule, TableNames
from objectives.config import ObjectiveConfig
from objectives.processes import Flow, NoiseProcess

TOKENS = 512
"""Tokens of a caption and of the template after it, the pipeline's default."""
SUFFIX_TOKENS = 5
"""Tokens of the template after a caption."""
TEXT_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Hidden states of the text encoder, unless the pipeline's configuration names others."""
DISTILLED_SHIFT = math.exp(1.15)
"""The shift that Turbo's pipeline has for all sizes."""
TEXT_FUSION = "text_fusion"
ATTENTION = r"transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)"
ATTENTION_NAMES: Names = {
    "to_q": "wq",
    "to_k": "wk",
    "to_v": "wv",
    "to_gate": "gate",
    "to_out.0": "wo",
    "norm_q": "qknorm.qnorm",
    "norm_k": "qknorm.knorm",
}
BLOCK: Names = {
    "norm1": "prenorm",
    "norm2": "postnorm",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
    "scale_shift_table": "mod.lin",
}
TOP_LEVEL: Names = {
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.norm": "txtmlp.0",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
    "final_layer.norm": "last.norm",
    "final_layer.linear": "last.linear",
    "final_layer.scale_shift_table": "last.modulation.lin",
}
TABLE = (
    Rule(r"transformer_blocks\.(\d+)\.attn\.", r"blocks.\1.attn.", ATTENTION_NAMES),
    Rule(r"transformer_blocks\.(\d+)\.", r"blocks.\1.", BLOCK),
    Rule(r"text_fusion\.(\w+\.\d+)\.attn\.", r"txtfusion.\1.attn.", ATTENTION_NAMES),
    Rule(r"text_fusion\.(\w+\.\d+)\.", r"txtfusion.\1.", BLOCK),
    Rule("", "", TOP_LEVEL),
)


class StackedLayout(MaskedLayout):
    """ComfyUI's tokens, which have the states of all layers in a row."""

    def __init__(self, num_layers: int, width: int):
        super().__init__(num_layers * width, max_tokens=TOKENS)
        self.num_layers = num_layers

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        rows = super().tensors(cond, extras)["prompt_embeds"]
        embeds = rows.unflatten(1, (self.num_layers, -1))
        return {"prompt_embeds": embeds}

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        embeds = tensors["prompt_embeds"]
        rows = embeds.flatten(1)
        return super().conditioning({"prompt_embeds": rows})


class Krea2(QwenVaeFamily):
    """Conditioning is (L, layers, D): the states of the caption and of the template after it.

    The pipeline hides padding between the two, which has no effect on the other tokens."""

    name = "krea2"
    pipelines = ("Krea2Pipeline",)
    denoiser_class = "Krea2Transformer2DModel"
    layer_names = TableNames(
        table=TABLE,
        original_only=r".*norm.*",
        writes_alpha=False,  # diffusers' converter knows none
        comfyui_loads_norms=False,
    )
    variable_length: ClassVar = {"prompt_embeds": None}
    max_tokens = TOKENS
    neutral_guidance = 0.0  # 1 is 2 in other models
    undistilled_model = "Krea 2 Raw (krea/Krea-2-Raw)"
    cond_width_key = "text_hidden_dim"
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|transformer_blocks\.\d+\.(attn\.to_gate|ff\.(gate|up|down))",
        "all": r".*",
    }
    comfy_widths: ClassVar = {30720: "Krea 2"}
    comfy_nodes = ComfyNodes(
        text_encoders=("qwen3vl_4b_bf16.safetensors",),
        text_encoder_type="krea2",
        vae="qwen_image_vae.safetensors",
        latents="EmptyLatentImage",
        shift="ModelSamplingAuraFlow",
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return {"txtfusion.projector.weight", "blocks.0.attn.wq.weight"} <= shapes.keys()

    @property
    def is_distilled(self) -> bool:
        """True for Turbo."""
        return bool(self.files.pipeline_config.get("is_distilled", False))

    @cached_property
    def comfy(self) -> ComfyLayout:
        return StackedLayout(self.denoiser_config["num_text_layers"], self.cond_width)

    def process(self, config: ObjectiveConfig) -> NoiseProcess:
        if config.shift is None and self.is_distilled:
            return Flow(lambda _: DISTILLED_SHIFT)
        return super().process(config)

    def trim_text_encoders(self, pipeline: Any) -> None:
        layers = self.files.pipeline_config.get("text_encoder_select_layers") or TEXT_LAYERS
        keep_first_layers(pipeline.text_encoder, max(layers))

    def blocks(self, denoiser: nn.Module, depth: int = 1) -> dict[str, nn.Module]:
        """Return the blocks, with those of the text fusion one by one."""
        top_blocks = super().blocks(denoiser, depth)
        blocks: dict[str, nn.Module] = {}
        for name, block in top_blocks.items():
            if name == TEXT_FUSION:
                blocks |= find_blocks(block, 1, name)
            else:
                blocks[name] = block
        return blocks

    def num_template_tokens(self) -> int:
        return super().num_template_tokens() + SUFFIX_TOKENS

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        embeds, masks = encoders.encode_prompt(
            captions,
            device=encoders._execution_device,
            max_sequence_length=TOKENS,
        )
        rows = []
        for embed, mask in zip(embeds, masks, strict=True):
            shown_embeds = embed[mask]
            rows.append({"prompt_embeds": shown_embeds})
        return rows

    def cond_layout(self) -> dict[str, TensorLayout]:
        layout = super().cond_layout()["prompt_embeds"]
        shape = (
            TOKENS,
            self.denoiser_config["num_text_layers"],
            self.cond_width,
        )
        return {"prompt_embeds": TensorLayout(shape, layout.dtype)}

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        embeds = cond["prompt_embeds"]
        num_tokens = embeds.shape[1]
        text_ids = torch.zeros(num_tokens, 3, device=noisy.device)
        grid_ids = image_ids(height // PATCH, width // PATCH, noisy.device)
        mask = None  # without one attention is faster
        if len(set(cond["lengths"])) > 1:
            mask = cond["attention_mask"]
        tokens = denoiser(
            hidden_states=pack(noisy),
            encoder_hidden_states=embeds,
            timestep=timestep / 1000,
            position_ids=torch.cat([text_ids, grid_ids]),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale, "max_sequence_length": TOKENS}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("krea2", "Krea-2", "https://github.com/krea-ai/krea-2")


FAMILY = Krea2
