"""Tiny FLUX.2 pipelines: byte-level tokenizers with the real ones' templates, Mistral 3 and Qwen3 of as many layers as
the pipelines look into."""

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTH = 16
MISTRAL_LAYERS, QWEN_LAYERS = (
    33,
    30,
)  # the last state that the pipelines take is the 30th, the 27th
MISTRAL_SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "<pad>",
]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set text = message['content'][0]['text'] %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 1024,
}  # fmt: skip


def byte_vocabulary(special: list[str]) -> dict[str, int]:
    return {
        token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """As the tokenizer of the pipeline's PixtralProcessor, which needs torchvision: it pads on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=MISTRAL_SPECIAL[3:-1], padding_side="left", chat_template=MISTRAL_TEMPLATE,
    )  # fmt: skip


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(MISTRAL_SPECIAL), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def qwen_tokenizer() -> Qwen2Tokenizer:
    return Qwen2Tokenizer(
        vocab=byte_vocabulary(QWEN_SPECIAL), merges=[], additional_special_tokens=QWEN_SPECIAL[1:],
        chat_template=QWEN_TEMPLATE,
    )  # fmt: skip


def mistral() -> Mistral3ForConditionalGeneration:
    return Mistral3ForConditionalGeneration(mistral_config(MISTRAL_LAYERS)).eval()


def mistral_config(num_layers: int) -> Mistral3Config:
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    text = {
        "model_type": "mistral",
        "vocab_size": len(mistral_tokenizer()),
        "num_hidden_layers": num_layers,
        **TEXT,
    }
    return Mistral3Config(text_config=text, vision_config=vision)


def qwen() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(qwen_tokenizer()), num_hidden_layers=QWEN_LAYERS, **TEXT)
    ).eval()


def vae(levels: int = 3) -> AutoencoderKLFlux2:
    """Cells of 4 pixels, 8 when they are patched, and statistics that are not those of latents."""
    model = AutoencoderKLFlux2(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, norm_num_groups=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.3, 3.0)
    return model.eval()


def transformer(guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def unpack(pipeline: object, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Latents (B, C, h, w) from the pipeline's (B, h w, C)."""
    step = 2 * pipeline.vae_scale_factor
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height // step, width // step)


def stored(pipeline: object, latents: torch.Tensor, offset: float | None = None) -> torch.Tensor:
    """What a data set has of the latents that the pipeline decodes: what the pipeline would make of an image's.

    `offset`: of the variances, if not that of the VAE."""
    center, variance = pipeline.vae.bn.running_mean, pipeline.vae.bn.running_var
    spread = (variance + (offset or pipeline.vae.config.batch_norm_eps)).sqrt()
    return (pipeline._patchify_latents(latents) - center.view(1, -1, 1, 1)) / spread.view(
        1, -1, 1, 1
    )
