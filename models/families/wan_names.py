"""Names of layers in the original Wan."""

from models.layer_names.tables import Names, Rule, TableNames

ATTENTION: Names = {
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
BLOCK: Names = {
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
IMAGE_EMBEDDER: Names = {
    "norm1": "0",
    "ff.net.0.proj": "1",
    "ff.net.2": "3",
    "norm2": "4",
}
EMBEDDERS: Names = {
    "time_embedder.linear_1": "time_embedding.0",
    "time_embedder.linear_2": "time_embedding.2",
    "time_proj": "time_projection.1",
    "text_embedder.linear_1": "text_embedding.0",
    "text_embedder.linear_2": "text_embedding.2",
}
TOP_LEVEL: Names = {"proj_out": "head.head", "scale_shift_table": "head.modulation"}

WAN_NAMES = TableNames(
    table=(
        Rule(r"blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn.", ATTENTION),
        Rule(r"blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn.", ATTENTION),
        Rule(r"blocks\.(\d+)\.", r"blocks.\1.", BLOCK),
        Rule(r"condition_embedder\.image_embedder\.", "img_emb.proj.", IMAGE_EMBEDDER),
        Rule(r"condition_embedder\.", "", EMBEDDERS),
        Rule("", "", TOP_LEVEL),
    ),
    original_only=r".*",
    file_formats=("comfyui",),  # diffusers reads it too, and ComfyUI reads no other format
    diffusers_prefix="",
    writes_alpha=False,  # diffusers' converter reads alpha in the blocks alone
)
