"""Families whose CLIP text encoders are trained with the denoiser: captions are stored as tokens,
and encoded in the loop.

The text encoders become children of the denoiser, under their names in a pipeline, so that
adapters, DDP and checkpoints see one model; its class gets a `forward` that encodes the tokens
first, inside of DDP's.
"""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from common.errors import ModelError
from models.families.unet_family import UNetFamily

# of an encoder's layers, by the preset of targets
TARGETS = {
    "attention": r"self_attn\.(q|k|v|out)_proj",
    "attention-mlp": r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
    "all": r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
}


class EncodesText(nn.Module):
    """A denoiser with text encoders as children; given `cond`, it makes its other arguments of it
    by `embed`."""

    original: ClassVar[type[nn.Module]]
    embed: Callable[[nn.Module, dict[str, Tensor]], dict[str, Any]]

    def forward(self, *args: Any, cond: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        embedded = {} if cond is None else self.embed(self, cond)
        return super().forward(*args, **embedded, **kwargs)


@cache
def encoding(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` under the same name as one that encodes text."""
    return type(cls.__name__, (EncodesText, cls), {"original": cls, "__module__": cls.__module__})


class TextTraining(UNetFamily):
    """What is different then: a base class beside the family's own, and before it."""

    @property
    def targets(self) -> dict[str, str]:  # type: ignore[override]
        last = {
            name: self.part_config(name)["num_hidden_layers"] - 1 for name in self.read_before_last
        }
        unread = "".join(
            rf"(?!{name}\.(text_model\.)?encoder\.layers\.{n}\.)" for name, n in last.items()
        )
        return {
            preset: rf"(?!text_encoder)({pattern})|{unread}text_encoder.*\.{TARGETS[preset]}"
            for preset, pattern in super().targets.items()
        }

    @property
    def encoders(self) -> list[str]:
        return [name for name in self.text if name.startswith("text_encoder")]

    @property
    def tokenizers(self) -> list[str]:
        return [name for name in self.text if name.startswith("tokenizer")]

    def joined(self, denoiser: nn.Module, encoders: dict[str, nn.Module]) -> nn.Module:
        for name, encoder in encoders.items():
            denoiser.add_module(name, encoder.requires_grad_(False))
        denoiser.__class__ = encoding(type(denoiser))  # type: ignore[arg-type]
        denoiser.embed = lambda model, cond: self.inputs(self.embedded(model, cond))  # type: ignore[assignment]
        return denoiser

    def load_denoiser(self, dtype: torch.dtype | None) -> nn.Module:
        denoiser = super().load_denoiser(dtype)
        loaded = self._load(*self.encoders)
        wanted = next(denoiser.parameters()).dtype
        return self.joined(
            denoiser, {name: getattr(loaded, name).to(wanted) for name in self.encoders}
        )

    def empty_denoiser(self) -> nn.Module:
        loaded = self._load(*self.encoders)
        return self.joined(
            super().empty_denoiser(),
            {name: getattr(loaded, name).to("meta") for name in self.encoders},
        )

    def load_encoders(self, what: Literal["text", "media"]) -> Any:
        return super().load_encoders(what) if what == "media" else self._load(*self.tokenizers)

    def component_files(self, component: str) -> list[Path]:
        text = super().component_files("text") if component == "denoiser" else []
        return list(dict.fromkeys([*super().component_files(component), *text]))

    def encode_prompt(self, encoders: Any, captions: list[str]) -> list[dict[str, Tensor]]:
        """Per caption its tokens (L,) for each text encoder, under the encoder's name."""
        rows: list[dict[str, Tensor]] = [{} for _ in captions]
        for name in self.tokenizers:
            tokenizer = getattr(encoders, name)
            length = tokenizer.model_max_length
            found = tokenizer(
                captions,
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            for row, tokens in zip(rows, found.input_ids, strict=True):
                row[name.replace("tokenizer", "text_encoder")] = tokens.to(torch.int32)
        return rows

    def cond_bytes(self) -> int:
        return len(self.encoders) * self.counting_tokenizer.model_max_length * torch.int32.itemsize

    def cond_from_comfy(self, cond: Tensor, extras: dict[str, Any]) -> dict[str, Tensor]:
        raise ModelError(
            "already encoded, but --model.train_text_encoder encodes captions in every step"
        )

    def cond_to_comfy(self, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        raise ModelError(
            "captions are not encoded with --model.train_text_encoder: leave it out to export a dataset"
        )

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timestep: Tensor, cond: dict[str, Tensor]
    ) -> Tensor:
        return denoiser(noisy, timestep, cond=cond, return_dict=False)[0]

    def pipeline(self, denoiser: nn.Module | None) -> Any:
        if denoiser is None:
            return super().pipeline(None)
        alone = copy.copy(denoiser)  # the same layers, without the text encoders
        alone.__class__ = type(denoiser).original  # type: ignore[attr-defined]
        alone._modules = {
            name: module for name, module in denoiser._modules.items() if name not in self.encoders
        }
        loaded = self._load("vae", "scheduler", *self.tokenizers, denoiser=alone)
        loaded.register_modules(**{name: getattr(denoiser, name) for name in self.encoders})
        return loaded

    def idle_layers(self, denoiser: nn.Module) -> list[str]:
        """Of encoders whose output is not read, but that of a layer before."""
        idle = [*super().idle_layers(denoiser)]
        for encoder in self.read_before_last:
            layers = [
                name
                for name, _ in denoiser.named_modules()
                if re.fullmatch(rf"{encoder}\..*layers\.\d+", name)
            ]
            idle += [
                layers[-1],
                layers[-1].replace(f"encoder.layers.{len(layers) - 1}", "final_layer_norm"),
            ]
        return idle

    def text_names(self, denoiser: nn.Module) -> dict[str, str]:
        names = {}
        for number, encoder in enumerate(self.encoders, 1):
            prefix = "lora_te" if len(self.encoders) == 1 else f"lora_te{number}"
            for name, module in denoiser.get_submodule(encoder).named_modules():
                if isinstance(getattr(module, "weight", None), nn.Parameter):
                    inside = name.removeprefix("text_model.")
                    inside = inside if inside == "text_projection" else f"text_model.{inside}"
                    names[f"{encoder}.{name}"] = f"{prefix}_{inside.replace('.', '_')}"
        return names


def trains_text(cls: type[UNetFamily]) -> type[UNetFamily]:
    """`cls` with its text encoders trained too."""
    return type(cls.__name__, (TextTraining, cls), {"name": f"{cls.name} with text encoders"})
