"""Names of layers in the original FLUX.1, and in the models made from it: Chroma and FLUX.2."""

from models.layer_names.tables import Names, Rule, Slice, SwappedHalves, fused_qkv

DOUBLE_BLOCK: Names = {
    **fused_qkv("attn.", "img_attn.qkv"),
    **fused_qkv("attn.", "txt_attn.qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
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
SINGLE_BLOCK: Names = {
    **fused_qkv("attn.", "linear1"),
    "proj_mlp": Slice("linear1", 3),
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}
TOP_LEVEL: Names = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": SwappedHalves("final_layer.adaLN_modulation.1"),
    "proj_out": "final_layer.linear",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
EMBEDDER: Names = {"linear_1": "in_layer", "linear_2": "out_layer"}
FLUX_TABLE = (
    Rule(r"transformer_blocks\.(\d+)\.", r"double_blocks.\1.", DOUBLE_BLOCK),
    Rule(r"single_transformer_blocks\.(\d+)\.", r"single_blocks.\1.", SINGLE_BLOCK),
    Rule(r"time_(?:text|guidance)_embed\.timestep_embedder\.", "time_in.", EMBEDDER),
    Rule(r"time_(?:text|guidance)_embed\.guidance_embedder\.", "guidance_in.", EMBEDDER),
    Rule(r"time_text_embed\.text_embedder\.", "vector_in.", EMBEDDER),
    Rule(
        r"distilled_guidance_layer\.layers\.(\d+)\.",
        r"distilled_guidance_layer.layers.\1.",
        EMBEDDER,
    ),
    Rule("", "", TOP_LEVEL),
)
