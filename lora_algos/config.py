"""The `adapter` section of the config, and what one layer's adapter is made with. No torch here:
`--help` reads it."""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from pydantic import Field

from common.config_fields import STRICT

BypassMode = Literal["auto", "true", "false"]


@dataclass(frozen=True)
class AdapterOptions:
    """What an algorithm is told beyond rank and alpha. With `existing_lora` only the dropouts
    count."""

    __pydantic_config__ = STRICT

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    init: Literal[
        "default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"
    ] = "default"
    """LoRA: initial factors, PEFT's names; pissa_niter_* are fast, nearly pissa. DoRA: default or gaussian. What an
    init takes out of the base is subtracted in the adapter instead, so the base stays as it is and the first step
    starts from it exactly."""
    tucker: bool = False
    """LoHa: factor convolutions larger than 1x1 in Tucker form, with a core of rank x rank x
    kernel."""
    factor: Annotated[int, Field(ge=-1)] = -1
    """LoKr: the smaller Kronecker factor's side is at most this; -1 splits nearest to a square."""
    decompose_both: bool = False
    """LoKr: give the smaller Kronecker factor the low-rank form too, where the rank is below half
    its sides."""
    full_matrix: bool = False
    """LoKr: never give a Kronecker factor the low-rank form; rank and alpha then mean nothing."""
    block_size: Annotated[int, Field(ge=2)] = 32
    """OFT and BOFT: side of a rotated block; each layer takes the largest that divides its output channels up to
    this."""
    constraint: Annotated[float, Field(ge=0)] = 0.0
    """OFT and BOFT: the largest Frobenius norm of a layer's skew matrices; 0 leaves the rotation
    free."""
    stages: Annotated[int, Field(ge=-1)] = -1
    """BOFT: butterfly stages; -1 takes as many as mix every output channel with every other."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drops elements of what the update is given as input, and scales the rest up."""
    rank_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drops ranks of the update (rows of a full matrix, blocks of a rotation) for one forward pass.
    """
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drops a layer's whole update for one forward pass."""


@dataclass(frozen=True)
class LayerSpec:
    """What one layer's adapter is made with."""

    rank: int = 8
    alpha: float = 1.0
    algorithm: str = "LoRA"
    options: AdapterOptions = field(default_factory=AdapterOptions)
    bypass_mode: BypassMode = "auto"
    lr_scale: float = 1.0
    bias: bool = False

    @property
    def scaling(self) -> float:
        """What an update with a rank is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.options.rslora else self.rank)


@dataclass(frozen=True)
class Override:
    """Other options for the layers that a pattern matches."""

    __pydantic_config__ = STRICT

    pattern: str
    """Regular expression that matches whole layer names. Of several that match a layer, the last
    one counts."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of these layers."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Alpha of these layers; none: as of the others."""
    algorithm: str | None = None
    """Algorithm of these layers, so that one run may mix several."""
    lr_scale: Annotated[float, Field(ge=0)] | None = None
    """Factor on the learning rate of these layers."""


@dataclass(frozen=True)
class AdapterConfig(AdapterOptions):
    """Which layers are adapted, and how.

    With `existing_lora` the file says what is adapted and how: then only the dropouts, `loraplus_lr_ratio` and the
    overrides' `lr_scale` apply. An option that no adapted layer has a use for is refused."""

    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; none: as large as the layer's rank, so by 1. With existing_lora: the
    file's."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("all",)
    """Layers to adapt: presets of the model family (attention, attention-mlp, all) or regular expressions that match
    whole layer names. With existing_lora: the file's."""
    train_norms: bool = False
    """Also train the weights of normalization layers (`.diff` in the file). With existing_lora: where the file has
    them."""
    train_biases: bool = False
    """Also train the biases of adapted layers, and of normalization layers where these are trained (`.diff_b`). With
    existing_lora: where the file has them."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """LoRA+: the factor that starts at zero learns this many times faster than the other (LoRA,
    DoRA, LoHa, GLoRA)."""
    overrides: tuple[Override, ...] = ()
    """Other rank, alpha, algorithm or learning rate for some layers. With existing_lora only
    lr_scale counts."""

    def options(self) -> AdapterOptions:
        """The algorithm's options alone."""
        return AdapterOptions(
            **{item.name: getattr(self, item.name) for item in fields(AdapterOptions)}
        )
