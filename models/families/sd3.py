"""Stable Diffusion 3 and 3.5: a transformer over image and text tokens.

(Esser et al. 2024, arXiv 2403.03206.) It has two CLIP text encoders and, unless the folder has
none, T5.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.base import TensorLayout, base_metadata
from models.comfy import ComfyLayout, PooledLayout
from models.comfy_nodes import ComfyNodes
from models.families.transformer_family import (
    ATTENTION,
    CLIP_G_PREFIX,
    CLIP_L_PREFIX,
    MLP,
    T5_PREFIX,
    TransformerFamily,
    pooled_rows,
)
from models.layer_names.tables import Names, Rule, SwappedHalves, TableNames, fused_qkv
from models.quantized_weight import plain_values
from models.weight_file import WeightFile

T5_TOKENS = 256
"""Tokens of T5, the pipeline's default."""
BLOCK: Names = {
    **fused_qkv("attn.", "x_block.attn.qkv"),
    **fused_qkv("attn2.", "x_block.attn2.qkv"),
    **fused_qkv("attn.", "context_block.attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": SwappedHalves("context_block.adaLN_modulation.1"),
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
TOP_LEVEL: Names = {
    "pos_embed.proj": "x_embedder.proj",
    "norm_out.linear": SwappedHalves("final_layer.adaLN_modulation.1"),
    "proj_out": "final_layer.linear",
}
EMBEDDER: Names = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
TABLE = (
    Rule(r"transformer_blocks\.(\d+)\.", r"joint_blocks.\1.", BLOCK),
    Rule(r"time_text_embed\.timestep_embedder\.", "t_embedder.", EMBEDDER),
    Rule(r"time_text_embed\.text_embedder\.", "y_embedder.", EMBEDDER),
    Rule("", "", TOP_LEVEL),
)


class StableDiffusion3(TransformerFamily):
    """Conditioning is the tokens of both CLIPs, joined and padded to T5's width, and then T5's.

    ComfyUI has as many tokens of T5 as the caption, and at least 77. All tokens count, because the
    model has no mask: captions of different lengths are in different batches."""

    name = "sd3"
    undistilled_model = "SD3.5 large (stabilityai/stable-diffusion-3.5-large)"
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    denoiser_class = "SD3Transformer2DModel"
    text_components = (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    unused_components = ("feature_extractor", "image_encoder")
    file_prefixes: ClassVar = {
        **TransformerFamily.file_prefixes,
        "text_encoder": CLIP_L_PREFIX,
        "text_encoder_2": CLIP_G_PREFIX,
        "text_encoder_3": T5_PREFIX,
    }
    latent_shift = 0.0609
    latent_scale = 1.5305
    layer_names = TableNames(table=TABLE)
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|{MLP}",
        "all": r".*",
    }
    comfy_widths: ClassVar = {4096: "SD3"}
    comfy_nodes = ComfyNodes(
        text_encoders=("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"),
        shift="ModelSamplingSD3",
        schedule="normal",
        text_length=T5_TOKENS,
        separate_vae="sd3_vae.safetensors",
    )

    @classmethod
    def matches_checkpoint(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        keys = {"joint_blocks.0.x_block.attn.qkv.weight", "pos_embed", "y_embedder.mlp.0.weight"}
        return keys <= shapes.keys()

    def read_buffers(self, file: WeightFile, dtype: torch.dtype) -> dict[str, Tensor]:
        key = f"{self.files.denoiser_prefix}pos_embed"
        positions = file.read(key, dtype)
        return {"pos_embed.pos_embed": plain_values(positions)}

    @property
    def patch_size(self) -> int:
        return self.denoiser_config["patch_size"]

    @property
    def pooled_width(self) -> int:
        return self.denoiser_config["pooled_projection_dim"]

    @cached_property
    def comfy(self) -> ComfyLayout:
        return PooledLayout(self.cond_width, self.pooled_width)

    @property
    def has_t5(self) -> bool:
        return "tokenizer_3" not in self.files.missing_components

    @cached_property
    def tokenizer(self) -> Any:
        """T5's tokenizer, which sees more of a caption than CLIP's; CLIP's if there is no T5."""
        component = "tokenizer_3" if self.has_t5 else "tokenizer"
        return getattr(self.load_components(component), component)

    @property
    def max_tokens(self) -> int:
        return T5_TOKENS if self.has_t5 else self.clip_tokens

    @property
    def clip_tokens(self) -> int:
        """Tokens of a caption that CLIP encodes."""
        return self.component_config("text_encoder")["max_position_embeddings"]

    def cond_layout(self) -> dict[str, TensorLayout]:
        shape = (self.clip_tokens + T5_TOKENS, self.cond_width)
        return {
            "prompt_embeds": TensorLayout(shape, torch.float32),
            "pooled_prompt_embeds": TensorLayout((self.pooled_width,), torch.float32),
        }

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        if encoders.text_encoder_3 is None:
            return self._encode_by_clip(encoders, captions)
        embeds, _, pooled, _ = encoders.encode_prompt(
            captions,
            None,
            None,
            device=encoders._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
        return pooled_rows(embeds, pooled)

    def _encode_by_clip(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        """Encode without T5, whose tokens are zeros.

        The pipeline would need the denoiser, which is not loaded, for the width of these zeros."""
        device = encoders._execution_device
        embeds = []
        pooled = []
        for clip_index in (0, 1):
            clip_embeds, clip_pooled = encoders._get_clip_prompt_embeds(
                captions, 1, device, None, clip_index
            )
            embeds.append(clip_embeds)
            pooled.append(clip_pooled)
        joined = torch.cat(embeds, -1)
        padding = (0, self.cond_width - joined.shape[-1], 0, T5_TOKENS)
        return pooled_rows(nn.functional.pad(joined, padding), torch.cat(pooled, -1))

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        return denoiser(
            noisy,
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        config: Any = denoiser.config
        if config.qk_norm is None:
            version = "m"
        elif config.dual_attention_layers:
            version = "5-medium"
        else:
            version = "5-large"
        return base_metadata(f"sd3-{version}", f"stable-diffusion-3-{version}")


FAMILY = StableDiffusion3
