"""Facts about an algorithm's tensors, which the algorithm states in its own file.

Readers and writers of adapter files, and the tools, build their tables from these facts. They know
no algorithm by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_algos.tensors import ALPHA, LayerTensors

Layers = dict[str, LayerTensors]
"""Layer name -> its tensors."""
Weights = Mapping[str, Tensor]
"""Layer name -> weight of the base model."""
Metadata = Mapping[str, str]


@dataclass(frozen=True)
class RowAxis:
    """The axis of a tensor that holds the rows (output channels) of the weight."""

    axis: int = 0
    unit: int = 1
    """Rows of the weight per entry of the axis."""
    step: int = 1
    """The rows can be cut at multiples of this number."""
    inner_tensor: str = ""
    """Tensor whose first axis holds the rows inside a unit, so that one unit can be cut alone."""


RowAxes = dict[str, RowAxis]


def first_axes(*names: str) -> Callable[[LayerTensors, int], RowAxes]:
    """Return the `row_axes` of tensors with one row of the weight per entry of their first axis."""

    def row_axes(tensors: LayerTensors, num_rows: int) -> RowAxes:
        return {name: RowAxis() for name in names if name in tensors}

    return row_axes


def unchanged(tensors: LayerTensors) -> LayerTensors:
    """Return the tensors."""
    return tensors


def unchanged_for_weight(tensors: LayerTensors, weight: Tensor, metadata: Metadata) -> LayerTensors:
    """Return the tensors."""
    return tensors


def without_metadata(tensors: LayerTensors, weight: Tensor) -> tuple[LayerTensors, dict[str, str]]:
    """Return the tensors, and no metadata."""
    return tensors, {}


def no_options(layers: Layers, weights: Weights) -> dict[str, Any]:
    """Return no options."""
    return {}


@dataclass(frozen=True)
class PeftTraits:
    """PEFT's form of an algorithm."""

    peft_type: str
    """`peft_type` in adapter_config.json."""
    alpha_option: str = "alpha"
    """Name of the alpha in adapter_config.json."""
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    """Name of a tensor here -> PEFT's name, where they differ."""
    options: Callable[[Layers, Weights], dict[str, Any]] = no_options
    """Further options in adapter_config.json for layers with these tensors and weights.

    Raises AdapterError if PEFT makes no layers that these tensors fit."""
    scaled_tensor: str = ""
    """Tensor that takes over PEFT's alpha / r in layers that have no rank and no scaling here."""
    channel_vector: str = ""
    """Vector over the output channels that PEFT gives the dimensions of a convolution's output."""


@dataclass(frozen=True)
class FileTraits:
    """Forms of an algorithm's tensors in files of other programs."""

    foreign_names: tuple[str, ...] = ()
    """Tensors that other programs or checkpoints have, and that `import_tensors` or
    `import_for_weight` rewrite."""
    alternatives: Mapping[str, str] = field(default_factory=dict)
    """Foreign tensor -> the tensor that it replaces. A layer must not have both."""
    import_tensors: Callable[[LayerTensors], LayerTensors] = unchanged
    """Rewrite foreign tensors as this algorithm's. IN: a layer's valid tensors, with an alpha."""
    import_for_weight: Callable[[LayerTensors, Tensor, Metadata], LayerTensors] = (
        unchanged_for_weight
    )
    """Rewrite foreign tensors that depend on the layer's weight. IN: result of `import_tensors`,
    cut to the layer's rows, the weight, and the file's metadata."""
    export_for_weight: Callable[[LayerTensors, Tensor], tuple[LayerTensors, dict[str, str]]] = (
        without_metadata
    )
    """Return the tensors as ComfyUI and kohya's programs read them, and metadata that says so."""
    metadata_keys: tuple[str, ...] = ()
    """Keys of metadata that `export_for_weight` writes."""
    portable: Callable[[LayerTensors], LayerTensors] = unchanged
    """Return tensors of the same function that all programs read alike and that can be cut."""
    default_alpha: float | None = None
    """Alpha that a file without one means; None: the rank."""
    lycoris_alpha_unit: Callable[[LayerTensors], int] | None = None
    """Factor of the alpha in files of LyCORIS, where its unit differs from ComfyUI's."""
    writes_alpha: bool = True
    """A file has an alpha for each layer."""
    shared_alpha_tensor: str = ""
    """Tensor into which a layer's own scaling is moved, so that all layers can have one alpha.

    Set if some program applies one alpha to all layers."""
    is_in_diffusers_format: bool = False
    """The format `diffusers` has names for the tensors: those of PEFT."""
    is_portable_in_diffusers_format: bool = False
    """ComfyUI, too, computes the same function from a file in that format."""
    kohya_module: str = "lycoris.kohya"
    """Module of kohya's scripts or LyCORIS that trains it (`ss_network_module`)."""
    kohya_algo: str = ""
    """LyCORIS' word for it in `ss_network_args`; empty: the name in lower case."""
    peft: PeftTraits | None = None
    """None: PEFT does not have the algorithm, or has another function under its name."""


@dataclass(frozen=True)
class TensorTraits:
    """Names, sides and dependencies of an algorithm's tensors.

    `alpha` and `diff_b`, the change of a layer's bias, are common to all algorithms and not named
    here."""

    names: tuple[str, ...]
    """All tensors that a layer may have in a file."""
    detected_by: tuple[str, ...]
    """Tensors that show the algorithm of a layer in a file: one of them is enough."""
    dropout_axes: Mapping[str, int]
    """Tensor -> the axis along which rank_dropout drops. Without one of these there is no update.

    In this order masks are drawn, so it is the same on every process."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Tensors that a layer has all or none of."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> another one that it cannot be used without."""
    vectors: tuple[str, ...] = ()
    """Tensors that may have one dimension; all others have two or more."""
    rank_axes: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> its axis whose side is the rank. The first one that a layer has counts.

    An update without a rank has no scaling."""
    rank_of_whole_factors: Callable[[LayerTensors], int] | None = None
    """Return a rank with which PEFT and LyCORIS build layers that have no rank; None: they take no
    rank."""
    is_multiplicative: bool = False
    """The update is a product, so rank_dropout does not scale up the ranks that are left."""
    starts_at_zero: tuple[str, ...] = ()
    """Factors of a product that start at zero; LoRA+ trains them faster."""
    needs_base_weight: bool = False
    """The update is a function of the base weight, not of the tensors alone."""
    adapts_norms: bool = False
    """The algorithm also fits the weight vectors of normalization layers."""
    fp32_tensors: tuple[str, ...] = ()
    """Tensors with the digits of the whole weight, which files hold in fp32.

    Their rounding errors are relative to W + dW, not to dW."""
    row_axes: Callable[[LayerTensors, int], RowAxes] | None = None
    """Return the axes that hold the rows of a weight with that many rows; other tensors are common
    to all rows. None: an adapter cannot be cut by rows."""
    zero_rows_change_nothing: bool = True
    """Rows of zeros in all of these axes leave the rows of the weight unchanged."""
    factor_pairs: tuple[tuple[str, str], ...] = ()
    """Pairs (up, down) whose ranks are summed over: up (rows, rank, ...), down (rank, ...).

    Several pairs of a layer have a common rank."""
    weight_shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, ...]] | None = None
    """Return the shape of the weight from the shapes of a layer's tensors.

    A side that the tensors do not show is 1. Raises KeyError, IndexError or ValueError for damaged
    layers."""
    has_exact_weight_shape: bool = False
    """`weight_shape` is right for convolutions too, not only up to their form as a matrix."""
    to_lora: Callable[[LayerTensors, torch.Size], LayerTensors] | None = None
    """Return the tensors of a LoRA of the same function.

    None: no LoRA of a lower rank than the layer's has this function."""
    files: FileTraits = field(default_factory=FileTraits)

    def rank(self, tensors: LayerTensors) -> int | None:
        """Return the rank of a layer's update, if it has one."""
        for name, axis in self.rank_axes.items():
            if name in tensors and tensors[name].ndim > axis:
                return tensors[name].shape[axis]
        return None

    def rank_and_alpha(self, tensors: LayerTensors) -> tuple[int, float]:
        """Return rank and alpha of a layer. A layer without a rank has rank 1 here.

        A missing alpha means the rank, which scales by 1."""
        rank = self.rank(tensors) or 1
        alpha = tensors.get(ALPHA)
        return rank, float(rank if alpha is None else alpha)

    def nominal_rank(self, tensors: LayerTensors) -> int | None:
        """Return the rank with which PEFT and LyCORIS build layers that these tensors fit.

        None: they take no rank."""
        rank = self.rank(tensors)
        if rank is None and self.rank_of_whole_factors is not None:
            return self.rank_of_whole_factors(tensors)
        return rank

    def scaling(self, tensors: LayerTensors) -> float:
        """Return alpha / rank, or 1 if the update has no rank: alpha has no meaning then."""
        if not self.rank(tensors):
            return 1.0
        rank, alpha = self.rank_and_alpha(tensors)
        return alpha / rank
