"""The `adapter` section of the config. No torch here: `--help` reads it."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field


class AdapterError(ValueError):
    """Targets that match no layer, or an adapter file that does not fit the model."""


@dataclass(frozen=True)
class AdapterConfig:
    """Which layers are adapted, and how strongly."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    alpha: Annotated[float, Field(gt=0)] = 1.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("all",)
    """Layers to adapt: presets of the model family (attention, attention-mlp, all) or regular expressions that match
    whole layer names."""
