"""FLUX.1 (Black Forest Labs 2024), dev and schnell: a transformer over image and text tokens, of
which the first blocks have weights of their own for each kind; T5 for the tokens, CLIP for a pooled
vector.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import base_metadata
from models.checkpoint_files import CLIP_L, T5
from models.families.packing import PATCH, image_ids, pack, unpack
from models.families.transformer_family import (
    ATTENTION,
    MLP,
    PooledTextFamily,
    TransformerFamily,
    counts,
    pooled_rows,
)
from models.layer_names.transformers import FLUX

TOKENS = 512  # of T5, the pipelines' default
SCHNELL_TOKENS = 256  # all that schnell was trained with
BLOCKS = {
    "double_blocks.0.img_attn.qkv.weight",
    "single_blocks.0.linear1.weight",
    "img_in.weight",
    "txt_in.weight",
}


class FluxFamily(TransformerFamily):
    """What FLUX.1 and Chroma have in common: cells of 2 x 2 latents as tokens, and positions (0, row, column) of them,
    (0, 0, 0) of all text."""

    names = FLUX
    text_tokens = TOKENS
    ragged: ClassVar = {"prompt_embeds": None}
    latent_shift, latent_scale = 0.1159, 0.3611
    targets: ClassVar = {
        "attention": ATTENTION,
        "attention-mlp": rf"{ATTENTION}|{MLP}|single_transformer_blocks\.\d+\.proj_(mlp|out)",
        "all": r".*",
    }

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        if config["in_channels"] != self.latent_channels * PATCH**2:
            raise ModelError(
                f"--model.path {self.config.path} takes {config['in_channels']} channels per token, not "
                f"{self.latent_channels * PATCH**2}: it edits or follows an image, which cannot be trained here"
            )

    def denoiser_of_file(self, denoiser_class: Any, dtype: torch.dtype) -> nn.Module:
        return self.denoiser_by_names(
            denoiser_class, dtype
        )  # diffusers' converter knows one width only

    def pixel_step(self) -> int:
        return self.latent_step() * PATCH

    def token_counts(self, captions: list[str]) -> tuple[list[int], int]:
        return counts(self.counting_tokenizer, captions, self.text_tokens)

    def mask(self, noisy: Tensor, cond: dict[str, Any]) -> Tensor | None:
        """(B, tokens of text and image), false where a text is filled up to the length of the batch's longest; None if
        none is: attention without a mask is faster."""
        if len(set(cond["lengths"])) == 1:
            return None
        image = torch.ones(
            len(noisy), self.tokens(noisy.shape), dtype=torch.bool, device=noisy.device
        )
        return torch.cat([cond["attention_mask"].bool(), image], 1)

    @abstractmethod
    def inputs(self, noisy: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
        """What the denoiser is given besides tokens, their positions and the timestep."""

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        height, width = noisy.shape[2:]
        text = cond["prompt_embeds"]
        tokens = denoiser(
            hidden_states=pack(noisy),
            timestep=timestep / 1000,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            img_ids=image_ids(height // PATCH, width // PATCH, noisy.device),
            return_dict=False,
            **self.inputs(noisy, cond),
        )[0]
        return unpack(tokens, height, width)


class Flux1(FluxFamily, PooledTextFamily):
    """T5 sees 512 tokens, of schnell 256, filled up with padding that counts like text; ComfyUI's conditioning has 256
    of them, or as many as a longer caption."""

    name = "flux1"
    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    denoiser_class = "FluxTransformer2DModel"
    text = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    tokenizer = "tokenizer_2"
    in_file: ClassVar = {**FluxFamily.in_file, "text_encoder": (CLIP_L,), "text_encoder_2": (T5,)}
    unused = ("feature_extractor", "image_encoder")
    takes_guidance = True

    @classmethod
    def holds(cls, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return BLOCKS | {"vector_in.in_layer.weight"} <= shapes.keys()

    def check_denoiser(self, config: Mapping[str, Any]) -> None:
        super().check_denoiser(config)
        if self.config.guidance_scale is not None and not config.get("guidance_embeds"):
            raise ModelError(
                f"--model.guidance_scale {self.config.guidance_scale:g}: {self.config.path} has no guidance "
                "input, which only guidance-distilled models such as FLUX.1 dev have. Remove the option"
            )

        told = (
            self.path.is_file()
            and f"{self.stored_prefix}guidance_in.in_layer.weight" in self.stored_shapes
        )
        if told and not config.get("guidance_embeds"):
            raise ModelError(
                f"--model.path {self.config.path} is told guidance, as FLUX.1 dev is, and --model.config "
                f"{self.source} is of a model that is told none, as schnell"
            )

    @property
    def text_tokens(self) -> int:  # type: ignore[override]
        return TOKENS if self.denoiser_config["guidance_embeds"] else SCHNELL_TOKENS

    @property
    def text_form(self) -> str:  # type: ignore[override]
        return "" if self.text_tokens == TOKENS else f"{self.text_tokens} tokens"

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        device = encoders.text_encoder_2.device
        embeds, pooled, _ = encoders.encode_prompt(
            captions, device=device, max_sequence_length=self.text_tokens
        )
        return pooled_rows(embeds, pooled)

    def cond_bytes(self) -> int:
        return (
            self.text_tokens * self._width * self._text_dtype("text_encoder_2").itemsize
            + self._pooled_width * 4
        )

    def inputs(self, noisy: Tensor, cond: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"pooled_projections": cond["pooled_prompt_embeds"]}
        if (mask := self.mask(noisy, cond)) is not None:
            found["joint_attention_kwargs"] = {"attention_mask": mask[:, None, None]}
        if self.denoiser_config["guidance_embeds"]:
            found["guidance"] = torch.full((len(noisy),), self.guidance, device=noisy.device)
        return found

    def preview_options(self, guidance_scale: float) -> dict[str, Any]:
        return {**super().preview_options(guidance_scale), "max_sequence_length": self.text_tokens}

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        config: Any = denoiser.config
        return base_metadata("flux1", f"flux-1-{'dev' if config.guidance_embeds else 'schnell'}")


FAMILY = Flux1
