"""Tiny text encoders and the tokenizer of Qwen-Image and Z-Image, of the real classes."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.tiny_models import WORDS
from models.image_text_processor import ImageTextProcessor, ImageTextProcessor3

WIDTH = 16
MARKS = ["<|im_start|>", "<|im_end|>"]
IMAGE_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IMAGE_MARK_NAMES = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
EDIT_SEEN = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.\nuser\nassistant\n"
    "Picture 1: 2: 3:"
)
# the words of Qwen-Image's template, each of which must be one token: the pipeline cuts off as many as the real one has
SEEN = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant\n"
)
# of Qwen3's template what concerns one message: thinking is left to the model, or it is shown that there was none
CHAT = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# of Qwen3-VL's template what concerns a message of texts
CHAT_OF_PARTS = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- for part in message.content %}{{ part.text }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}"
)
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH,
}  # fmt: skip
# of a model with vision: its positions have three axes
VISION_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


@lru_cache
def qwen_tokenizer(has_images: bool = False, template: str = SEEN) -> Qwen2Tokenizer:
    """Byte-level pairs, trained until every word is one token; `has_images`: for the models that edit."""
    marks, text = (MARKS + IMAGE_MARKS, EDIT_SEEN) if has_images else (MARKS, template)
    empty = Qwen2Tokenizer(extra_special_tokens=marks, model_max_length=32768)
    tokenizer = empty.train_new_from_iterator(
        [text, *(f" {word}" for word in WORDS)], 2000, show_progress=False
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def image_text_processor(name: str = "Qwen2VLProcessor") -> Any:
    """As transformers' own class of that name, which needs torchvision, writes itself."""
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56)
    tokenizer = qwen_tokenizer(has_images=True)
    if name == "Qwen2VLProcessor":
        return ImageTextProcessor(image_processor, tokenizer)
    return ImageTextProcessor3(image_processor, tokenizer, chat_template=CHAT_OF_PARTS)


def special_tokens(has_images: bool = False) -> dict[str, int]:
    tokenizer = qwen_tokenizer(has_images)
    return {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def qwen25_vl(has_images: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """`has_images`: with the marks of images, for the models that edit."""
    vision = {**VISION, "fullatt_block_indexes": [0]}
    text = {**TEXT, **special_tokens(has_images), "rope_parameters": VISION_ROPE}
    if has_images:
        text["max_position_embeddings"] = 8192
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **image_marks(has_images))
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def image_marks(has_images: bool) -> dict[str, int]:
    """The ids of the marks of images in a configuration."""
    marks: dict[str, int] = {}
    if has_images:
        for name, mark in IMAGE_MARK_NAMES.items():
            marks[name] = qwen_tokenizer(has_images).convert_tokens_to_ids(mark)
    return marks


def qwen3_vl(
    has_images: bool = False, **more: int
) -> Qwen3VLModel | Qwen3VLForConditionalGeneration:
    """`has_images`: with the marks of images and a head. `more`: of the text's configuration."""
    vision = {**VISION, "deepstack_visual_indexes": [0]}
    text = {
        **TEXT, **special_tokens(has_images), "rope_parameters": VISION_ROPE, "head_dim": 8, **more,
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **image_marks(has_images))
    model_class = Qwen3VLForConditionalGeneration if has_images else Qwen3VLModel
    return model_class(config).eval()


def qwen3(has_images: bool = False) -> Qwen3Model:
    return Qwen3Model(Qwen3Config(**TEXT, **special_tokens(has_images), head_dim=8)).eval()


def states(pipeline: Any, text: str) -> tuple[Tensor, ...]:
    """The states (1, L, D) of the pipeline's text encoder for `text`, which has its marks already."""
    tokens = pipeline.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states
