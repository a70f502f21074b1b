"""What the transformers have in common whose captions a Qwen model reads, between the marks of a
chat."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import check_comfy_cond
from models.families.packing import PATCH
from models.families.transformer_family import TransformerFamily, counts


class QwenTextFamily(TransformerFamily):
    """Conditioning is one state of the text encoder, of as many tokens as the caption and its marks
    have."""

    ragged: ClassVar = {"prompt_embeds": None}
    most_tokens: ClassVar[int]
    """Of a caption, with the marks that are part of the conditioning."""
    cond_width_name: ClassVar[str]
    """What the denoiser's config calls the width of conditioning."""

    @property
    def cond_width(self) -> int:
        return self.denoiser_config[self.cond_width_name]

    def denoiser_of_file(self, denoiser_class: Any, dtype: torch.dtype) -> nn.Module:
        return self.denoiser_by_names(
            denoiser_class, dtype
        )  # diffusers takes Qwen-Image's without a prefix only

    def pixel_step(self) -> int:
        return self.latent_step() * PATCH

    @abstractmethod
    def marks(self) -> str:
        """What is tokenized with a caption and becomes conditioning, in front of it and behind it."""

    def token_counts(self, captions: list[str]) -> tuple[list[int], int]:
        tokenizer = self.counting_tokenizer
        return counts(
            tokenizer, captions, self.most_tokens - len(tokenizer(self.marks()).input_ids)
        )

    def cond_bytes(self) -> int:
        """Of the longest caption."""
        return self.most_tokens * self.cond_width * self._text_dtype("text_encoder").itemsize

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        check_comfy_cond(cond, self.cond_width)
        return {"prompt_embeds": cond[0, : attended(cond, extras.get("attention_mask"))]}

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return cond["prompt_embeds"][None], {"pooled_output": None}


def attended(cond: Tensor, mask: Tensor | None) -> int:
    """How many tokens of ComfyUI's conditioning (1, L, D) its attention_mask (1, L) lets count: the
    first of them."""
    if mask is None:
        return cond.shape[1]
    if mask.shape != cond.shape[:2]:
        raise ModelError(
            f"an attention_mask of shape {tuple(mask.shape)} for conditioning of {tuple(cond.shape)}"
        )
    seen = mask[0].bool()
    count = int(seen.sum())
    if not count or not seen[:count].all():
        raise ModelError(
            "an attention_mask in which tokens count that stand behind ones that do not, or none at all"
        )
    return count
