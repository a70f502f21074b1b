"""Names of layers in the original LTX-2 and LTX-2.3."""

from models.layer_names.tables import Names, Rule, TableNames

NORMS: Names = {"norm_q": "q_norm", "norm_k": "k_norm"}
BLOCK: Names = {
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
}
MODULATIONS = {
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
"""diffusers' names of the modules that make modulations from the timestep -> original names."""
MODULATION: Names = {
    layer: layer
    for layer in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
}
TOP_LEVEL: Names = {"proj_in": "patchify_proj", "audio_proj_in": "audio_patchify_proj"}

LTX2_NAMES = TableNames(
    table=(
        Rule(r"transformer_blocks\.(\d+)\.(\w+)\.", r"transformer_blocks.\1.\2.", NORMS),
        Rule(r"transformer_blocks\.(\d+)\.", r"transformer_blocks.\1.", BLOCK),
        *(Rule(rf"{name}\.", f"{original}.", MODULATION) for name, original in MODULATIONS.items()),
        Rule("", "", TOP_LEVEL),
    ),
    original_only=r".*",
    file_formats=("comfyui",),  # diffusers reads it too, and ComfyUI reads no `transformer.`
    diffusers_prefix="",
    writes_alpha=False,  # diffusers refuses a file with alpha
)
