"""The `adapter` section of the config, and the specification of one layer's adapter.

This module imports no torch, because `--help` imports it.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from pydantic import Field

from common.config_fields import STRICT

BypassMode = Literal["auto", "true", "false"]


@dataclass(frozen=True)
class AdapterOptions:
    """Options of an algorithm besides rank and alpha. With `existing_lora` only the dropouts are
    used."""

    __pydantic_config__ = STRICT

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    init: Literal[
        "default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"
    ] = "default"
    """LoRA: initial factors, by PEFT's names; pissa_niter_* are faster approximations of pissa.
    DoRA: default or gaussian. A product that an initialization takes out of the base is subtracted
    in the adapter instead. So the base is unchanged, and the first step starts exactly from it."""
    tucker: bool = False
    """LoHa: factor convolutions larger than 1x1 in Tucker form, with a core of rank x rank x
    kernel."""
    factor: Annotated[int, Field(ge=-1)] = -1
    """LoKr: largest side of the smaller Kronecker factor; -1 splits nearest to a square."""
    decompose_both: bool = False
    """LoKr: give the smaller Kronecker factor the low-rank form too, if the rank is below half its
    sides."""
    full_matrix: bool = False
    """LoKr: never give a Kronecker factor the low-rank form; rank and alpha have no meaning then."""
    block_size: Annotated[int, Field(ge=2)] = 32
    """OFT and BOFT: largest side of a rotated block. Each layer takes the largest one that divides
    its output channels."""
    constraint: Annotated[float, Field(ge=0)] = 0.0
    """OFT and BOFT: largest Frobenius norm of a layer's skew matrices; 0 leaves the rotation free."""
    stages: Annotated[int, Field(ge=-1)] = -1
    """BOFT: butterfly stages; -1 takes as many as mix every output channel with every other one."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an element of the update's input; the others are scaled up."""
    rank_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a rank of the update (a row of a full matrix, a block of a rotation)
    for one forward pass."""
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a layer's whole update for one forward pass."""

    @property
    def has_dropout(self) -> bool:
        """Return whether anything is dropped in training."""
        return bool(self.dropout or self.rank_dropout or self.module_dropout)


@dataclass(frozen=True)
class LayerSpec:
    """The specification of one layer's adapter."""

    rank: int = 8
    alpha: float = 1.0
    algorithm: str = "LoRA"
    options: AdapterOptions = field(default_factory=AdapterOptions)
    bypass_mode: BypassMode = "auto"
    lr_scale: float = 1.0
    bias: bool = False
    """Train the bias too."""

    @property
    def scaling(self) -> float:
        """Factor of an update with a rank."""
        divisor = math.sqrt(self.rank) if self.options.rslora else self.rank
        return self.alpha / divisor


@dataclass(frozen=True)
class Override:
    """Different options for the layers that match a pattern."""

    __pydantic_config__ = STRICT

    pattern: str
    """Preset, or regular expression that matches whole layer names. If several patterns match a
    layer, the last one is used."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of these layers."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Alpha of these layers. Not set: that of the other layers."""
    algorithm: str | None = None
    """Algorithm of these layers. One run can mix several."""
    lr_scale: Annotated[float, Field(ge=0)] | None = None
    """Factor of the learning rate of these layers."""


@dataclass(frozen=True)
class AdapterConfig(AdapterOptions):
    """Adapted layers and their adapters.

    With `existing_lora` the file decides this. Then only the dropouts, `loraplus_lr_ratio` and the
    overrides' `lr_scale` are used. An option that no adapted layer supports is an error."""

    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank. Not set: the layer's rank, which scales by 1. With
    existing_lora: that of the file."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("all",)
    """Layers to adapt: presets of the model family (attention, attention-mlp, all), or regular
    expressions that match whole layer names. With existing_lora: those of the file."""
    train_norms: bool = False
    """Also train the weights of normalization layers (`.diff` in the file). With existing_lora: if
    the file has them."""
    train_biases: bool = False
    """Also train the biases of adapted layers, including normalization layers (`.diff_b`). With
    existing_lora: if the file has them."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """LoRA+: the factor that starts at zero has this many times the learning rate of the other one
    (LoRA, DoRA, LoHa, GLoRA)."""
    overrides: tuple[Override, ...] = ()
    """Different rank, alpha, algorithm or learning rate for some layers. With existing_lora only
    lr_scale is used."""

    def options(self) -> AdapterOptions:
        """Return the options of the algorithm alone."""
        values = {item.name: getattr(self, item.name) for item in fields(AdapterOptions)}
        return AdapterOptions(**values)
