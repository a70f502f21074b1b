"""Anima (CircleStone Labs and Comfy Org 2026): Cosmos-Predict2's transformer, trained on drawings.

A conditioner makes the embeddings of T5's tokens from the states of Qwen3 0.6B. Its VAE is that of
Qwen-Image.
"""

from collections.abc import Mapping
from functools import cached_property, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import TensorLayout, base_metadata
from models.checkpoint_files import DENOISER_PREFIXES
from models.comfy import ComfyLayout, Conditioning
from models.comfy_nodes import ComfyNodes
from models.component_loaders import ComponentLoaders
from models.families.modular_family import ModularFamily
from models.families.qwen_vae import QwenVaeFamily
from models.families.transformer_family import MLP
from models.latents import with_frame_axis
from models.layer_loading import open_weights
from models.layer_names.tables import Names, Rule, TableNames
from models.quantized_weight import plain_values

TOKENS = 512
"""Tokens of a caption: of T5, of Qwen3, and rows of embeddings that the transformer is given."""
CONDITIONER = "text_conditioner"
CONDITIONER_PREFIXES = tuple(f"{prefix}llm_adapter." for prefix in (*DENOISER_PREFIXES, ""))
ATTENTION = r"transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)"
ATTENTION_NAMES: Names = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out.0": "output_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
BLOCK: Names = {
    "norm1.linear_1": "adaln_modulation_self_attn.1",
    "norm1.linear_2": "adaln_modulation_self_attn.2",
    "norm2.linear_1": "adaln_modulation_cross_attn.1",
    "norm2.linear_2": "adaln_modulation_cross_attn.2",
    "norm3.linear_1": "adaln_modulation_mlp.1",
    "norm3.linear_2": "adaln_modulation_mlp.2",
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
}
TOP_LEVEL: Names = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
    "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
    "time_embed.norm": "t_embedding_norm",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
}
TABLE = (
    Rule(r"transformer_blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn.", ATTENTION_NAMES),
    Rule(r"transformer_blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn.", ATTENTION_NAMES),
    Rule(r"transformer_blocks\.(\d+)\.", r"blocks.\1.", BLOCK),
    Rule("", "", TOP_LEVEL),
)


class ConditionedLayout(ComfyLayout):
    """ComfyUI's tokens after the conditioner. It takes them, but makes those before it."""

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        if "t5xxl_ids" in extras:
            raise ModelError(
                "conditioning with t5xxl_ids: the states of Qwen3, before the model's conditioner. "
                "Use captions"
            )
        return super().tensors(cond, extras)


class Anima(ModularFamily, QwenVaeFamily):
    """Conditioning is what the conditioner makes, without the zeros after it.

    The conditioner is frozen: it computes in precompute, with the text encoder."""

    name = "anima"
    name_check = (
        "every layer of Cosmos-Predict2, whose class Anima's derives from, is in the table of names of "
        "ComfyUI 0.33.0, which was run"
    )
    pipelines = ("AnimaModularPipeline",)
    denoiser_class = "CosmosTransformer3DModel"
    text_components = ("text_encoder", "tokenizer", "t5_tokenizer", CONDITIONER)
    caption_tokenizer = "t5_tokenizer"
    text_steps = ("text_encoder", "denoise.text_conditioning")
    file_prefixes: ClassVar = {CONDITIONER: CONDITIONER_PREFIXES}
    layer_names = TableNames(
        table=TABLE,
        original_only=r".*",
        file_formats=("comfyui",),  # diffusers reads it too, and ComfyUI reads no other format
        diffusers_prefix="",
        writes_alpha=False,  # diffusers' converter knows none
    )
    variable_length: ClassVar = {"prompt_embeds": TOKENS}
    max_tokens = TOKENS
    cond_width_key = "text_embed_dim"
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|{MLP}",
        "all": r".*",
    }
    comfy_widths: ClassVar = {1024: "Anima"}
    comfy_nodes = ComfyNodes(
        text_encoders=("qwen_3_06b_base.safetensors",),
        text_encoder_type="stable_diffusion",  # ComfyUI knows the encoder by its file
        vae="qwen_image_vae.safetensors",
        latents="EmptyLatentImage",
        shift="ModelSamplingAuraFlow",
        difference="For an empty negative prompt, ComfyUI encodes a token of padding. The trainer's "
        "pipeline gives its conditioner no state of Qwen3.",
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        keys = {"llm_adapter.embed.weight", "blocks.0.adaln_modulation_cross_attn.1.weight"}
        return keys <= shapes.keys()

    def find_source(self) -> str:
        return "circlestone-labs/Anima-Base-v1.0-Diffusers"

    @cached_property
    def comfy(self) -> ComfyLayout:
        return ConditionedLayout(self.cond_width, max_tokens=TOKENS, has_frame_axis=True)

    def adapt_denoiser(self, denoiser: nn.Module) -> None:
        provide_resize()

    def component_loaders(self) -> ComponentLoaders:
        loaders = super().component_loaders()
        if CONDITIONER in self.files.contained_components:
            loaders[CONDITIONER] = self.load_conditioner
        return loaders

    def load_conditioner(self) -> nn.Module:
        """Load the conditioner of a single file, in fp32."""
        from diffusers import AnimaTextConditioner

        conditioner: Any = AnimaTextConditioner.from_config(self.component_config(CONDITIONER))
        weights = {}
        with self.files.loading_errors(), open_weights(self.files.path) as file:
            for key in self.files.shapes:
                prefix = next((text for text in CONDITIONER_PREFIXES if key.startswith(text)), None)
                if prefix is not None:
                    weight = plain_values(file.read(key, torch.float32))
                    weights[key.removeprefix(prefix)] = weight
            conditioner.load_state_dict(weights)
        return conditioner.eval()

    def cond_layout(self) -> dict[str, TensorLayout]:
        dtype = self.files.component_dtype(CONDITIONER)
        return {"prompt_embeds": TensorLayout((TOKENS, self.cond_width), dtype)}

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

        for tokenizer in (encoders.tokenizer, encoders.t5_tokenizer):
            tokenizer.padding_side = "right"  # the conditioner counts positions from the left
        encoded: Any = AnimaTextEncoderStep.encode_prompt(
            encoders,
            captions,
            prepare_unconditional_embeds=False,
            max_sequence_length=TOKENS,
        )
        masks = encoded["t5_attention_mask"]
        # an empty caption has a row of zeros, which changes nothing; without any, fused CUDA kernels
        # may return NaN
        state_masks = encoded["qwen_attention_mask"].index_fill(1, masks.new_zeros(1), 1)
        embeds = encoders.text_conditioner(
            source_hidden_states=encoded["qwen_prompt_embeds"],
            source_attention_mask=state_masks,
            target_input_ids=encoded["t5_input_ids"],
            target_attention_mask=masks,
        )
        counts = masks.sum(1).tolist()
        return [
            {"prompt_embeds": embed[:count].clone()}
            for embed, count in zip(embeds, counts, strict=True)
        ]

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        predicted = denoiser(
            hidden_states=with_frame_axis(noisy, True),
            timestep=timestep / 1000,
            encoder_hidden_states=cond["prompt_embeds"],
            padding_mask=noisy.new_zeros(1, 1, height, width),
            return_dict=False,
        )[0]
        return with_frame_axis(predicted, False)

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return base_metadata("anima", "Anima", "https://huggingface.co/circlestone-labs/Anima")


def provide_resize() -> None:
    """Give diffusers' transformer the one function of torchvision that it calls, if it is missing.

    It scales the padding mask, which is all zeros for a whole image."""
    module: Any = import_module("diffusers.models.transformers.transformer_cosmos")
    if hasattr(module, "transforms"):
        return
    resize = partial(nn.functional.interpolate, mode="nearest")
    module.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda image, size, **_: resize(image, size=size)),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )


FAMILY = Anima
