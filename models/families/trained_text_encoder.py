"""Training of CLIP text encoders together with the denoiser.

Captions are stored as tokens, and encoded in every step. The text encoders become children of the
denoiser, under their names in a pipeline. So adapters, DDP and checkpoints see one model. The
denoiser's class gets a `forward` that encodes the tokens first, inside DDP's forward.
"""

import copy
import re
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.base import Role, TensorLayout
from models.block_format import PLAIN, BlockFormat
from models.comfy import ComfyConditioning, ComfyLayout, Conditioning
from models.families.unet_family import UNetFamily

ATTENTION = r"self_attn\.(q|k|v|out)_proj"
TARGETS = {
    "attention": ATTENTION,
    "attention-mlp": rf"({ATTENTION}|mlp\.fc[12])",
    "all": rf"({ATTENTION}|mlp\.fc[12])",
}
"""Preset of --adapter.targets -> regular expression for the ends of names in a text encoder."""


class EncodesText(nn.Module):
    """A denoiser with text encoders as children.

    Given `cond`, it makes its other arguments from it by `encode`."""

    original_class: ClassVar[type[nn.Module]]
    encode: Callable[[nn.Module, dict[str, Tensor]], dict[str, Any]]

    def forward(self, *args: Any, cond: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        arguments = {} if cond is None else self.encode(self, cond)
        return super().forward(*args, **arguments, **kwargs)


@cache
def text_encoding_class(denoiser_class: type[nn.Module]) -> Any:
    """Return a subclass of the denoiser's class, with the same name, that encodes text."""
    members = {"original_class": denoiser_class, "__module__": denoiser_class.__module__}
    return type(denoiser_class.__name__, (EncodesText, denoiser_class), members)


class TokenLayout(ComfyLayout):
    """No layout: ComfyUI has no conditioning that could still be encoded."""

    def read(self, cond: Tensor, extras: dict[str, Any]) -> Conditioning:
        raise ModelError(
            "already encoded; --model.train_text_encoder encodes captions in every step. Remove "
            "the option, or use images"
        )

    def conditioning(self, tensors: Conditioning) -> ComfyConditioning:
        raise ModelError(
            "captions are not encoded with --model.train_text_encoder. Remove the option to export "
            "a dataset"
        )


class TextTraining(UNetFamily):
    """A UNet family with trained text encoders; a mixin in front of the family's class."""

    @property
    def targets(self) -> dict[str, str]:  # type: ignore[override]
        unused_layers = ""
        for encoder in self.penultimate_encoders:
            unused_layers += self._unused_layer_pattern(encoder)
        targets = {}
        for preset, pattern in super().targets.items():
            in_denoiser = rf"(?!text_encoder)({pattern})"
            in_encoders = rf"{unused_layers}text_encoder.*\.{TARGETS[preset]}"
            targets[preset] = f"{in_denoiser}|{in_encoders}"
        return targets

    def _unused_layer_pattern(self, encoder: str) -> str:
        """Return a regular expression that does not match an encoder's last layer."""
        last_layer = self.component_config(encoder)["num_hidden_layers"] - 1
        return rf"(?!{encoder}\.(text_model\.)?encoder\.layers\.{last_layer}\.)"

    @property
    def encoder_names(self) -> list[str]:
        return [
            component for component in self.text_components if component.startswith("text_encoder")
        ]

    @property
    def tokenizer_names(self) -> list[str]:
        return [
            component for component in self.text_components if component.startswith("tokenizer")
        ]

    @cached_property
    def comfy(self) -> ComfyLayout:
        return TokenLayout(self.cond_width)

    def identity_components(self, role: Role) -> tuple[str, ...]:
        components = super().identity_components(role)
        return (*components, *self.text_components) if role == "denoiser" else components

    def load_denoiser(self, dtype: torch.dtype | None, blocks: BlockFormat = PLAIN) -> nn.Module:
        denoiser = super().load_denoiser(dtype, blocks)
        first_parameter = next(denoiser.parameters())
        return self._join_encoders(denoiser, first_parameter.dtype)

    def empty_denoiser(self, device: str = "meta") -> nn.Module:
        denoiser = super().empty_denoiser(device)
        return self._join_encoders(denoiser, torch.device(device))

    def _join_encoders(self, denoiser: nn.Module, to: torch.dtype | torch.device) -> nn.Module:
        """Return a denoiser that encodes text. The encoders are moved to a dtype or device."""
        pipeline = self.load_components(*self.encoder_names)
        for name in self.encoder_names:
            encoder = getattr(pipeline, name).to(to)
            denoiser.add_module(name, encoder.requires_grad_(False))
        denoiser.__class__ = text_encoding_class(type(denoiser))  # type: ignore[arg-type]
        denoiser.encode = self._denoiser_arguments_of_tokens  # type: ignore[assignment]
        return denoiser

    def _denoiser_arguments_of_tokens(
        self, denoiser: nn.Module, cond: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the UNet's arguments for tokens, encoded by the denoiser's text encoders."""
        encoded_cond = self.encode_tokens(denoiser, cond)
        return self.denoiser_arguments(encoded_cond)

    def load_encoders(self, role: Literal["text", "media"]) -> Any:
        if role == "media":
            return super().load_encoders(role)
        return self.load_components(*self.tokenizer_names)

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        """Return each caption's tokens (L,) for each text encoder, under the encoder's name."""
        rows: list[dict[str, Tensor]] = [{} for _ in captions]
        for component in self.tokenizer_names:
            tokenizer = getattr(encoders, component)
            tokens = tokenizer(
                captions,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            encoder = component.replace("tokenizer", "text_encoder")
            for row, caption_tokens in zip(rows, tokens, strict=True):
                row[encoder] = caption_tokens.to(torch.int32)
        return rows

    def cond_layout(self) -> dict[str, TensorLayout]:
        tokens = TensorLayout((self.max_tokens,), torch.int32)
        return dict.fromkeys(self.encoder_names, tokens)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Any]
    ) -> Tensor:
        return denoiser(noisy, timestep, cond=cond, return_dict=False)[0]

    def pipeline(self, denoiser: nn.Module | None, with_text_encoders: bool = True) -> Any:
        if denoiser is None:
            return super().pipeline(None)
        pipeline = self.load_components(
            "vae", "scheduler", *self.tokenizer_names, denoiser=self._without_encoders(denoiser)
        )
        encoders = {component: getattr(denoiser, component) for component in self.encoder_names}
        pipeline.register_modules(**encoders)
        return pipeline

    def _without_encoders(self, denoiser: nn.Module) -> nn.Module:
        """Return a denoiser of the same layers, without the text encoders."""
        plain_denoiser = copy.copy(denoiser)
        plain_denoiser.__class__ = type(denoiser).original_class  # type: ignore[attr-defined]
        plain_denoiser._modules = {
            name: module
            for name, module in denoiser._modules.items()
            if name not in self.encoder_names
        }
        return plain_denoiser

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        """Return the last layers of encoders that are read before their last layer."""
        idle_layers = list(super().idle_layers(denoiser))
        names = [name for name, _ in denoiser.named_modules()]
        for encoder in self.penultimate_encoders:
            pattern = rf"{encoder}\..*layers\.\d+"
            layers = [name for name in names if re.fullmatch(pattern, name)]
            last_layer = layers[-1]
            last_number = len(layers) - 1
            last_norm = last_layer.replace(f"encoder.layers.{last_number}", "final_layer_norm")
            idle_layers += [last_layer, last_norm]
        return idle_layers


def with_trained_text_encoders(family: type[UNetFamily]) -> type[UNetFamily]:
    """Return the class of a family whose text encoders are trained too."""
    members = {"name": f"{family.name} with text encoders"}
    return type(family.__name__, (TextTraining, family), members)
