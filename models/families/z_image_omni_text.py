"""The text of Z-Image omni: a caption in a template, which control images divide into segments.

The text encoder is given each segment alone, and sees no images. With control images the segments are:
one before the first image, one between two images, one with the caption, and one after the noisy image.
So a caption has the same embeddings with any control images. Those without control images are others,
and each caption has both.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.errors import ModelError
from models.comfy import ComfyConditioning, Conditioning, MaskedLayout
from models.controls import control_latents, features_name

TOKENS = 512
"""The pipeline's default, with the tokens of the template."""
PLAIN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""The template without control images."""
EDIT = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"
"""The segment with the caption between the last control image and the noisy image."""
FRAME = {
    "before_embeds": "<|im_start|>user\n<|vision_start|>",
    "between_embeds": "<|vision_end|><|vision_start|>",
    "after_embeds": "<|vision_end|><|im_end|>",
}
"""The segments without a caption, by the names of their embeddings."""
FRAME_TOKENS = {"before_embeds": 4, "between_embeds": 2, "after_embeds": 2}
COMFY_TEXTS = "reference_latents_text_embeds"
"""ComfyUI's name of the segments without a caption, in their order."""


def encode_texts(encoders: Any, texts: list[str]) -> list[Tensor]:
    """Return the encoder's last state but one of each text, (tokens, D), as the pipeline makes it."""
    tokens = encoders.tokenizer(
        texts,
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    tokens = tokens.to(encoders._execution_device)
    masks = tokens.attention_mask.bool()
    output = encoders.text_encoder(
        input_ids=tokens.input_ids,
        attention_mask=masks,
        output_hidden_states=True,
    )
    embeds = []
    for state, mask in zip(output.hidden_states[-2], masks, strict=True):
        embeds.append(state[mask])
    return embeds


def encode_captions(encoders: Any, captions: list[str]) -> list[Conditioning]:
    """Return the conditioning of each caption, without and with control images."""
    plain_texts = [PLAIN.format(caption) for caption in captions]
    edit_texts = [EDIT.format(caption) for caption in captions]
    frame_texts = list(FRAME.values())
    plain = encode_texts(encoders, plain_texts)
    edits = encode_texts(encoders, edit_texts)
    frame = encode_texts(encoders, frame_texts)
    named_frame = dict(zip(FRAME, frame, strict=True))
    rows = []
    for prompt_embeds, edit_embeds in zip(plain, edits, strict=True):
        row = {
            "prompt_embeds": prompt_embeds,
            "edit_embeds": edit_embeds,
            **named_frame,
        }
        rows.append(row)
    return rows


def in_order(caption: Tensor, frame: Conditioning, num_controls: int) -> list[Tensor]:
    """Return the segments with control images: that of the caption, and those of the frame around it."""
    between = []
    if num_controls > 1:
        between = [frame["between_embeds"]] * (num_controls - 1)
    return [
        frame["before_embeds"],
        *between,
        caption,
        frame["after_embeds"],
    ]


def segments(cond: dict[str, Any], sample: int, num_controls: int) -> list[Tensor]:
    """Return the embeddings of the segments of one sample of a batch, in their order."""
    if not num_controls:
        num_tokens = cond["lengths"][sample]
        return [cond["prompt_embeds"][sample, :num_tokens]]
    num_tokens = cond["edit_embeds_lengths"][sample]
    caption = cond["edit_embeds"][sample, :num_tokens]
    frame = {}
    for name in FRAME:
        if name in cond:
            frame[name] = cond[name][sample]
    return in_order(caption, frame, num_controls)


class OmniLayout(MaskedLayout):
    """ComfyUI's segments. Tensors that ComfyUI does not have are extras by their own names.

    With control images, `cond` is the segment with the caption."""

    def tensors(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        tensors = super().tensors(cond, extras)
        references = extras.get("reference_latents") or ()
        if references:
            before, *between, after = comfy_texts(extras, len(references))
            tensors["edit_embeds"] = tensors["prompt_embeds"]
            tensors["before_embeds"] = before[0]
            if between:
                tensors["between_embeds"] = between[0][0]
            tensors["after_embeds"] = after[0]
        for name in own_names(len(references)):
            if name in extras:
                tensors[name] = extras[name][0]
        return tensors

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        num_controls = len(control_latents(tensors))
        shown_name = "edit_embeds" if num_controls else "prompt_embeds"
        shown = tensors[shown_name]
        extras: dict[str, Any] = {"pooled_output": None}
        for name in own_names(num_controls):
            if name in tensors and name != shown_name:
                extras[name] = tensors[name][None]
        if num_controls:
            texts = in_order(shown, tensors, num_controls)
            del texts[num_controls]  # that of the caption
            extras[COMFY_TEXTS] = [text[None] for text in texts]
        return shown[None], extras


def own_names(num_controls: int) -> list[str]:
    """Return the names of all tensors of a sample besides the latents."""
    names = ["prompt_embeds", "edit_embeds", *FRAME]
    for number in range(num_controls):
        name = features_name(number)
        names.append(name)
    return names


def comfy_texts(extras: Mapping[str, Any], num_controls: int) -> list[Tensor]:
    """Return ComfyUI's segments without a caption. Raises ModelError unless they fit the images."""
    texts = extras.get(COMFY_TEXTS)
    num_texts = num_controls + 1
    if not isinstance(texts, list | tuple) or len(texts) != num_texts:
        raise ModelError(
            f"reference_latents without {COMFY_TEXTS} of {num_texts} texts; expected those of the "
            "node TextEncodeZImageOmni"
        )
    return [*texts]
