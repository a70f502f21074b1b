"""Names of text encoders' tensors in GGUF files, as llama.cpp writes them, and transformers' names.

Sources: gguf.tensor_mapping; ComfyUI-GGUF reads the same files.
"""

import re

T5_NAMES = {
    r"token_embd\.(.*)": r"shared.\1",
    r"enc\.output_norm\.(.*)": r"encoder.final_layer_norm.\1",
    r"enc\.blk\.(\d+)\.attn_([qkvo])\.(.*)": r"encoder.block.\1.layer.0.SelfAttention.\2.\3",
    r"enc\.blk\.(\d+)\.attn_rel_b\.(.*)": (
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.\2"
    ),
    r"enc\.blk\.(\d+)\.attn_norm\.(.*)": r"encoder.block.\1.layer.0.layer_norm.\2",
    r"enc\.blk\.(\d+)\.ffn_norm\.(.*)": r"encoder.block.\1.layer.1.layer_norm.\2",
    r"enc\.blk\.(\d+)\.ffn_gate\.(.*)": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.\2",
    r"enc\.blk\.(\d+)\.ffn_up\.(.*)": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.\2",
    r"enc\.blk\.(\d+)\.ffn_down\.(.*)": r"encoder.block.\1.layer.1.DenseReluDense.wo.\2",
}
LANGUAGE_MODEL_NAMES = {
    r"token_embd\.(.*)": r"model.embed_tokens.\1",
    r"output_norm\.(.*)": r"model.norm.\1",
    r"output\.(.*)": r"lm_head.\1",
    r"blk\.(\d+)\.attn_([qkv])\.(.*)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"blk\.(\d+)\.attn_output\.(.*)": r"model.layers.\1.self_attn.o_proj.\2",
    r"blk\.(\d+)\.attn_([qk])_norm\.(.*)": r"model.layers.\1.self_attn.\2_norm.\3",
    r"blk\.(\d+)\.attn_norm\.(.*)": r"model.layers.\1.input_layernorm.\2",
    r"blk\.(\d+)\.ffn_norm\.(.*)": r"model.layers.\1.post_attention_layernorm.\2",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.(.*)": r"model.layers.\1.mlp.\2_proj.\3",
}
NAMES_OF_ARCHITECTURE = {
    "t5": T5_NAMES,
    "t5encoder": T5_NAMES,
    "qwen2vl": LANGUAGE_MODEL_NAMES,
    "qwen3": LANGUAGE_MODEL_NAMES,
}
"""`general.architecture` of a file -> expressions for its names, and transformers' names.

llama, as which Mistral is stored, is missing: its files have the rows of queries and keys in another
order."""


def transformers_name(name: str, architecture: str) -> str:
    """Return transformers' name of a tensor; `name` if the file is not of a text encoder."""
    for pattern, replacement in NAMES_OF_ARCHITECTURE.get(architecture, {}).items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return name
