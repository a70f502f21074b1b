"""Names of layers in HunyuanVideo 1.5 as ComfyUI has it, which are much like FLUX.1's."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from models.families.flux_names import DOUBLE_BLOCK, EMBEDDER
from models.layer_names.tables import Names, Rule, SwappedHalves, TableNames, fused_qkv

REFINER_BLOCK: Names = {
    **fused_qkv("attn.", "self_attn.qkv"),
    "attn.to_out.0": "self_attn.proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "ff.net.0.proj": "mlp.0",
    "ff.net.2": "mlp.2",
    "norm_out.linear": "adaLN_modulation.1",
}
GLYPH_EMBEDDER: Names = {
    "norm": "layernorm",
    "linear_1": "fc1",
    "linear_2": "fc2",
    "linear_3": "fc3",
}
IMAGE_EMBEDDER: Names = {"norm_in": "0", "linear_1": "1", "linear_2": "3", "norm_out": "4"}
TOP_LEVEL: Names = {
    "context_embedder.proj_in": "txt_in.input_embedder",
    "x_embedder.proj": "img_in.proj",
    "cond_type_embed": "cond_type_embedding",
    "norm_out.linear": SwappedHalves("final_layer.adaLN_modulation.1"),
    "proj_out": "final_layer.linear",
}
TABLE = (
    Rule(r"transformer_blocks\.(\d+)\.", r"double_blocks.\1.", DOUBLE_BLOCK),
    Rule(
        r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.",
        r"txt_in.individual_token_refiner.blocks.\1.",
        REFINER_BLOCK,
    ),
    Rule(r"context_embedder\.time_text_embed\.timestep_embedder\.", "txt_in.t_embedder.", EMBEDDER),
    Rule(r"context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder.", EMBEDDER),
    Rule(r"time_embed\.timestep_embedder\.", "time_in.", EMBEDDER),
    Rule(r"time_embed\.timestep_embedder_r\.", "time_r_in.", EMBEDDER),
    Rule(r"context_embedder_2\.", "byt5_in.", GLYPH_EMBEDDER),
    Rule(r"image_embedder\.", "vision_in.proj.", IMAGE_EMBEDDER),
    Rule("", "", TOP_LEVEL),
)
RELEASED_MARK = "img_attn_qkv."
RELEASED_NAMES = (
    ("_attn.qkv.", "_attn_qkv."),
    ("_attn.proj.", "_attn_proj."),
    ("_attn.norm.query_norm.", "_attn_q_norm."),
    ("_attn.norm.key_norm.", "_attn_k_norm."),
    ("_mod.lin.", "_mod.linear."),
    ("mlp.0.", "mlp.fc1."),
    ("mlp.2.", "mlp.fc2."),
    ("c_embedder.in_layer.", "c_embedder.linear_1."),
    ("c_embedder.out_layer.", "c_embedder.linear_2."),
    (".in_layer.", ".mlp.0."),
    (".out_layer.", ".mlp.2."),
)
"""Parts of names in ComfyUI -> in files for it, which it renames when it loads them. In this order."""


@dataclass(frozen=True, kw_only=True)
class HunyuanNames(TableNames):
    """Names by the table. Single files have them, or those of the files that ComfyUI renames."""

    def file_keys(self, denoiser: nn.Module, keys: Collection[str]) -> dict[str, str]:
        file_keys = super().file_keys(denoiser, keys)
        is_renamed = any(RELEASED_MARK in key for key in keys)
        if not is_renamed:
            return file_keys
        released_keys = {}
        for name, key in file_keys.items():
            released_keys[name] = released_key(key)
        return released_keys


def released_key(key: str) -> str:
    """Return a key of ComfyUI's model as a file that it renames has it."""
    for name, released_name in RELEASED_NAMES:
        key = key.replace(name, released_name)
    return key


HUNYUAN_NAMES = HunyuanNames(
    table=TABLE,
    original_only=r".*",
    file_formats=("comfyui",),  # ComfyUI reads no other format
    diffusers_prefix="",
)
