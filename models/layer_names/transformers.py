"""Names of diffusion transformers' layers in the original models' code, which are ComfyUI's, from
diffusers' names.

A table is a list of (regular expression for the beginning of a diffusers name, what stands for it,
table of the rest). A rest that ends in [i] is the i-th part of a fused weight; one that ends in ~
has scale and shift the other way round where the layer makes nothing else. Names that no table has
are the same in both.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from models.base import Native
from models.checkpoint_files import denoiser_prefix

Table = Iterable[tuple[str, str, dict[str, str]]]


def renamed(denoiser: nn.Module, table: Table, native_only: str = "(?!)") -> dict[str, Native]:
    """Where each layer that has a weight is in the original model. Empty denoisers will do.

    `native_only`: regular expression for the layers that ComfyUI does not know by diffusers' name.
    """
    modules = dict(denoiser.named_modules())
    layers: dict[str, Any] = {
        n: m for n, m in modules.items() if isinstance(getattr(m, "weight", None), nn.Parameter)
    }
    spelt = {layer: native_name(layer, table) for layer in layers}
    fused: dict[str, dict[int, str]] = {}
    found = {}
    for layer, name in spelt.items():
        shape = layers[layer].weight.shape
        whole, part = re.fullmatch(r"(.*?)(?:\[(\d)\])?", name).groups()  # type: ignore[union-attr]
        if part is not None:
            fused.setdefault(whole, {})[int(part)] = layer
        swapped = whole.endswith("~") and shape[0] == 2 * shape[1]
        known = not re.fullmatch(native_only, layer)
        found[layer] = Native(whole.removesuffix("~"), swapped=swapped, by_diffusers=known)
    for whole, parts in fused.items():
        first = 0
        for _, layer in sorted(parts.items()):
            count = layers[layer].weight.shape[0]
            found[layer] = Native(whole, (first, count))
            first += count
    return found


def stored_names(denoiser: nn.Module, table: Table, keys: Collection[str]) -> dict[str, str]:
    """Name of each parameter -> its key among those of a single file, which the original code or ComfyUI wrote; what it
    would be, if it is not there."""
    natives, prefix, found = renamed(denoiser, table), denoiser_prefix(keys), {}
    for name, _ in denoiser.named_parameters():
        layer, _, kind = name.rpartition(".")
        native = (
            f"{natives[layer].name}.{kind}"
            if layer in natives
            else native_name(name, table).removesuffix("~")
        )
        key = prefix + native
        scale = re.sub(
            "weight$", "scale", key
        )  # Black Forest Labs' files have it where ComfyUI has a norm's weight
        found[name] = scale if key not in keys and scale in keys else key
    return found


def native_name(layer: str, table: Table) -> str:
    """As the table spells it."""
    for pattern, replacement, rest in table:
        match = re.match(pattern, layer)
        if match and layer[match.end() :] in rest:
            return match.expand(replacement) + rest[layer[match.end() :]]
    return layer


def fused_qkv(
    prefix: str, weight: str, names: tuple[str, str, str] = ("to_q", "to_k", "to_v")
) -> dict[str, str]:
    return {f"{prefix}{name}": f"{weight}[{i}]" for i, name in enumerate(names)}


ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

FLUX_DOUBLE = {
    **fused_qkv("attn.", "img_attn.qkv"),
    **fused_qkv("attn.", "txt_attn.qkv", ADDED),
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
FLUX_SINGLE = {
    **fused_qkv("attn.", "linear1"),
    "proj_mlp": "linear1[3]",
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
FLUX_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1~",
    "proj_out": "final_layer.linear",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
EMBEDDER = {"linear_1": "in_layer", "linear_2": "out_layer"}
FLUX = (
    (r"transformer_blocks\.(\d+)\.", r"double_blocks.\1.", FLUX_DOUBLE),
    (r"single_transformer_blocks\.(\d+)\.", r"single_blocks.\1.", FLUX_SINGLE),
    (r"time_(?:text|guidance)_embed\.timestep_embedder\.", "time_in.", EMBEDDER),
    (r"time_(?:text|guidance)_embed\.guidance_embedder\.", "guidance_in.", EMBEDDER),
    (r"time_text_embed\.text_embedder\.", "vector_in.", EMBEDDER),
    (
        r"distilled_guidance_layer\.layers\.(\d+)\.",
        r"distilled_guidance_layer.layers.\1.",
        EMBEDDER,
    ),
    ("", "", FLUX_OUTSIDE),
)
"""FLUX.1, and what is made of it: Chroma and FLUX.2."""
CHROMA_NATIVE_ONLY = r"distilled_guidance_layer\..*"
FLUX2_NATIVE_ONLY = r"time_guidance_embed\..*|(double|single)_stream_modulation.*"

SD3_BLOCK = {
    **fused_qkv("attn.", "x_block.attn.qkv"),
    **fused_qkv("attn2.", "x_block.attn2.qkv"),
    **fused_qkv("attn.", "context_block.attn.qkv", ADDED),
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1~",
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
MLP = {"linear_1": "mlp.0", "linear_2": "mlp.2"}
SD3 = (
    (r"transformer_blocks\.(\d+)\.", r"joint_blocks.\1.", SD3_BLOCK),
    (r"time_text_embed\.timestep_embedder\.", "t_embedder.", MLP),
    (r"time_text_embed\.text_embedder\.", "y_embedder.", MLP),
    (
        "",
        "",
        {
            "pos_embed.proj": "x_embedder.proj",
            "norm_out.linear": "final_layer.adaLN_modulation.1~",
            "proj_out": "final_layer.linear",
        },
    ),
)

Z_IMAGE_ATTENTION = {
    **fused_qkv("", "qkv"),
    "to_out.0": "out",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
Z_IMAGE = (
    (
        r"(noise_refiner|context_refiner|layers)\.(\d+)\.attention\.",
        r"\1.\2.attention.",
        Z_IMAGE_ATTENTION,
    ),
    (
        r"all_(x_embedder|final_layer)\.[\d-]+",
        r"\1",
        {
            "": "",
            ".linear": ".linear",
            ".adaLN_modulation.1": ".adaLN_modulation.1",
        },
    ),
)

QWEN_IMAGE: Table = ()
"""All names are the same."""

WAN_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "norm_added_k": "norm_k_img",
}
WAN = (
    (r"blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn.", WAN_ATTENTION),
    (r"blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn.", WAN_ATTENTION),
    (
        r"blocks\.(\d+)\.",
        r"blocks.\1.",
        {
            "norm2": "norm3",
            "ffn.net.0.proj": "ffn.0",
            "ffn.net.2": "ffn.2",
            "scale_shift_table": "modulation",
        },
    ),
    (
        r"condition_embedder\.image_embedder\.",
        "img_emb.proj.",
        {
            "norm1": "0",
            "ff.net.0.proj": "1",
            "ff.net.2": "3",
            "norm2": "4",
        },
    ),
    (
        r"condition_embedder\.",
        "",
        {
            "time_embedder.linear_1": "time_embedding.0",
            "time_embedder.linear_2": "time_embedding.2",
            "time_proj": "time_projection.1",
            "text_embedder.linear_1": "text_embedding.0",
            "text_embedder.linear_2": "text_embedding.2",
        },
    ),
    ("", "", {"proj_out": "head.head", "scale_shift_table": "head.modulation"}),
)
WAN_NATIVE_ONLY = r".*"
