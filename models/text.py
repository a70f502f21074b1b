"""What families with text encoders have in common: tokens of captions, and vectors that stand for whole captions."""

from typing import Any

from torch import Tensor

from models.config import ModelError


def pooled_rows(embeds: Tensor, pooled: Tensor) -> list[dict[str, Tensor]]:
    """`encode_prompt` of text encoders' tokens (B, L, D) and pooled vectors (B, D)."""
    return [{"prompt_embeds": embed, "pooled_prompt_embeds": one} for embed, one in zip(embeds, pooled, strict=True)]


def counts(tokenizer: Any, captions: list[str], most: int) -> tuple[list[int], int]:
    """`token_counts` of an encoder that sees `most` tokens, its own marks among them."""
    found = [len(tokens) for tokens in tokenizer(captions, add_special_tokens=False, verbose=False).input_ids]
    return found, most - tokenizer.num_special_tokens_to_add()


def comfy_pooled(extras: dict[str, Any], width: int) -> Tensor:
    """(width,) ComfyUI's pooled_output; ModelError if there is none of that width."""
    pooled = extras.get("pooled_output")
    if pooled is None or pooled.shape != (1, width):
        there = "without" if pooled is None else f"of shape {tuple(pooled.shape)} as"
        raise ModelError(f"conditioning {there} pooled_output; this model takes (1, {width})")
    return pooled[0]
