"""ComfyUI's layout of conditioning and latents, as its custom nodes and this program exchange them.

ComfyUI's CONDITIONING of one text is a tensor `cond` (1, L, D) and a dict of extras. Families with
other extras define a subclass of ComfyLayout in their file.
"""

from typing import Any

from torch import Tensor

from common.errors import ModelError
from models import family_classes
from models.controls import control_latents, control_name

Conditioning = dict[str, Tensor]
"""Conditioning tensors of one caption, as from encode_prompt."""
ComfyConditioning = tuple[Tensor, dict[str, Any]]


class ComfyLayout:
    """Conditioning that is the tokens' embeddings alone."""

    def __init__(
        self,
        width: int,
        max_tokens: int | None = None,
        required: tuple[str, ...] = (),
        has_frame_axis: bool = False,
    ):
        self.width = width
        """D, the width of `cond`."""
        self.max_tokens = max_tokens
        """Largest L that the model takes, if there is a limit."""
        self.required = required
        """Tensors that the model needs and that extras may contain."""
        self.has_frame_axis = has_frame_axis
        """True if ComfyUI's latents have a frame axis, also those of an image."""

    def read(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        """WHEN: data that ComfyUI encoded are read.

        IN: one element of its CONDITIONING. OUT: tensors as from encode_prompt, and those of
        `sample_conditioning`. Raises ModelError if they do not fit the model."""
        self.check(cond)
        tensors = {**self.tensors(cond, extras), **self.controls(extras)}
        num_tokens = len(tensors["prompt_embeds"])
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise ModelError(
                f"conditioning of {num_tokens} tokens; this model takes {self.max_tokens}"
            )
        missing_names = [name for name in self.required if name not in tensors]
        if missing_names:
            raise ModelError(
                f"conditioning without {' and '.join(missing_names)}, which this model needs"
            )
        return tensors

    def check(self, cond: Tensor) -> None:
        """Raise ModelError, naming the model if possible, unless `cond` is (1, L >= 1, width)."""
        shape = tuple(cond.shape)
        if len(shape) != 3 or shape[0] != 1 or shape[1] == 0:
            raise ModelError(f"conditioning of shape {shape}, not (1, tokens, {self.width})")
        if shape[2] != self.width:
            raise ModelError(
                f"conditioning of {describe_width(shape[2])}; this model takes "
                f"{describe_width(self.width)}"
            )

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        """Return the tensors of `read`, whose checks are done elsewhere."""
        return {"prompt_embeds": cond[0]}

    def controls(self, extras: dict[str, Any]) -> Conditioning:
        """Return the raw latents of control images, by name. Raises ModelError."""
        references = extras.get("reference_latents")
        if references is None:
            return {}
        if not isinstance(references, list | tuple):
            raise ModelError("reference_latents that are not a list")
        controls = {}
        for number, latents in enumerate(references):
            is_tensor = isinstance(latents, Tensor)
            if not is_tensor or latents.ndim not in (4, 5) or len(latents) != 1:
                raise ModelError("reference_latents that are not a list of latents of one image")
            if latents.ndim == 5 and latents.shape[2] != 1:
                raise ModelError(f"reference_latents of {latents.shape[2]} frames; expected one")
            without_frames = latents[:, :, 0] if latents.ndim == 5 else latents
            controls[control_name(number)] = without_frames[0]
        return controls

    def write(self, tensors: Conditioning) -> ComfyConditioning:
        """WHEN: data are written for ComfyUI.

        IN: tensors as from encode_prompt, and those of control images. OUT: cond and extras. Extras
        always have "pooled_output", which is None if the family has no pooled embeddings."""
        cond, extras = self.conditioning(tensors)
        references = []
        for latents in control_latents(tensors):
            frames = latents[:, None] if self.has_frame_axis else latents
            references.append(frames[None])
        if references:
            extras["reference_latents"] = references
        return cond, extras

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        """Return the result of `write` without control images."""
        return tensors["prompt_embeds"][None], {"pooled_output": None}


class PooledLayout(ComfyLayout):
    """Conditioning of the tokens' embeddings and a pooled embedding (pooled_width,)."""

    def __init__(self, width: int, pooled_width: int, required: tuple[str, ...] = ()):
        super().__init__(width, required=required)
        self.pooled_width = pooled_width

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        return {"prompt_embeds": cond[0], "pooled_prompt_embeds": self._pooled(extras)}

    def _pooled(self, extras: dict[str, Any]) -> Tensor:
        pooled = extras.get("pooled_output")
        expected = (1, self.pooled_width)
        if pooled is None:
            raise ModelError(
                f"conditioning without pooled_output; this model takes pooled_output {expected}"
            )
        if pooled.shape != expected:
            raise ModelError(
                f"conditioning with pooled_output {tuple(pooled.shape)}; this model takes "
                f"pooled_output {expected}"
            )
        return pooled[0]

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        pooled = tensors["pooled_prompt_embeds"][None]
        return tensors["prompt_embeds"][None], {"pooled_output": pooled}


class MaskedLayout(ComfyLayout):
    """Conditioning of as many tokens as the caption; an attention_mask may hide others after it."""

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        num_tokens = count_attended(cond, extras.get("attention_mask"))
        return {"prompt_embeds": cond[0, :num_tokens]}


def count_attended(cond: Tensor, mask: Tensor | None) -> int:
    """Return how many of the tokens (1, L, D) the mask (1, L) shows, which must be the first."""
    if mask is None:
        return cond.shape[1]
    if mask.shape != cond.shape[:2]:
        raise ModelError(
            f"attention_mask of shape {tuple(mask.shape)}; expected {tuple(cond.shape[:2])}, one "
            "number for each token"
        )
    is_attended = mask[0].bool()
    num_attended = int(is_attended.sum())
    if num_attended == 0 or not is_attended[:num_attended].all():
        raise ModelError(
            "attention_mask with gaps or without any token; expected ones followed by zeros"
        )
    return num_attended


def describe_width(width: int) -> str:
    """Return `width N`, with the models whose conditioning has that width."""
    models: list[str] = []
    for family in family_classes().values():
        model = family.comfy_widths.get(width)
        if model is not None and model not in models:
            models.append(model)
    if not models:
        return f"width {width}"
    return f"width {width} ({', '.join(models)})"
