"""LoRA: dW = (alpha / rank) * up @ down (Hu et al. 2021, arXiv 2106.09685), in PEFT's layers with
PEFT's initializations and our forward pass.

Shapes, for a weight (out, in, *kernel): lora_down (rank, in, *kernel), lora_up (out, rank, 1...).
up starts at zero.

Some initializations start from another product (pissa, olora, orthogonal), which PEFT takes out of
the base weight. Here the base weight stays and the adapter subtracts the product:
dW = scaling * (up @ down - up_0 @ down_0). This is exactly zero at first in any dtype. A file holds
it as one LoRA of up to twice the rank.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from common.errors import AdapterError
from lora_algos.algorithm import Algorithm
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.kernels import Factors, Kernel
from lora_algos.layer_op import LayerOp
from lora_algos.low_rank import DOWN, UP, LowRank, product_difference
from lora_algos.peft_layers import LINEAR_INITS, LORA_LAYERS, peft_layer_class
from lora_algos.tensors import ALPHA, LayerTensors, Shapes
from lora_algos.traits import (
    FileTraits,
    Layers,
    PeftTraits,
    TensorTraits,
    Weights,
    first_axes,
)

MID = "lora_mid.weight"
"""Core of a LoRA in Tucker form, which other programs write for convolutions."""
INITIAL_UP, INITIAL_DOWN = "initial_up", "initial_down"
"""First values, in checkpoints of this program."""
PEFT_NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight"}


def weight_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the weight."""
    kernel = shapes.get(MID, shapes[DOWN])[2:]
    return shapes[UP][0], shapes[DOWN][1], *kernel


def import_tensors(tensors: LayerTensors) -> LayerTensors:
    """Return a LoRA in Tucker form, or one with a start, as a LoRA of the same function."""
    if MID in tensors:
        tensors = without_core(tensors)
    if INITIAL_UP in tensors:
        tensors = without_start(tensors)
    return tensors


def without_core(tensors: LayerTensors) -> LayerTensors:
    """Return a LoRA of the same rank whose down has the whole kernel."""
    merged_tensors = dict(tensors)
    mid = merged_tensors.pop(MID)
    down = tensors[DOWN].flatten(1)
    merged_tensors[DOWN] = torch.einsum("rj...,ji->ri...", mid, down)
    return merged_tensors


def without_start(tensors: LayerTensors) -> LayerTensors:
    """Return a LoRA that has the product of the first values subtracted."""
    merged_tensors = dict(tensors)
    initial_up = merged_tensors.pop(INITIAL_UP)
    initial_down = merged_tensors.pop(INITIAL_DOWN)
    up, down = product_difference(tensors[UP], tensors[DOWN], initial_up, initial_down)
    rank_ratio = len(down) / len(tensors[DOWN])
    merged_tensors |= {UP: up, DOWN: down, ALPHA: tensors[ALPHA] * rank_ratio}
    return merged_tensors


def to_lora(tensors: LayerTensors, weight: torch.Size) -> LayerTensors:
    """Return the tensors."""
    return tensors


def peft_options(layers: Layers, weights: Weights) -> dict[str, Any]:
    """Return PEFT's options of a plain LoRA."""
    return {"use_dora": False, "use_rslora": False}


class LoRA(Algorithm):
    """The product of two thin factors."""

    name = "LoRA"
    options = ("rslora", "init")
    traits = TensorTraits(
        names=(UP, DOWN),
        detected_by=(DOWN, UP),
        groups=((UP, DOWN), (INITIAL_UP, INITIAL_DOWN)),
        needs={MID: DOWN, INITIAL_UP: DOWN},
        rank_axes={DOWN: 0},
        dropout_axes={DOWN: 0, INITIAL_DOWN: 0},
        starts_at_zero=(UP,),
        row_axes=first_axes(UP),
        factor_pairs=((UP, DOWN),),
        weight_shape=weight_shape,
        has_exact_weight_shape=True,
        to_lora=to_lora,
        files=FileTraits(
            foreign_names=(MID, INITIAL_UP, INITIAL_DOWN),
            import_tensors=import_tensors,
            shared_alpha_tensor=UP,
            is_in_diffusers_format=True,
            is_portable_in_diffusers_format=True,
            kohya_module="networks.lora",
            peft=PeftTraits("LORA", "lora_alpha", PEFT_NAMES, peft_options),
        ),
    )

    def supports_option(
        self,
        option: str,
        options: AdapterOptions,
        weight: torch.Size,
    ) -> bool:
        if option == "init" and options.init in LINEAR_INITS and len(weight) > 2:
            return False
        return super().supports_option(option, options, weight)

    def shapes(self, spec: LayerSpec, weight: torch.Size) -> Shapes:
        out, channels, *kernel = weight
        init = spec.options.init
        if init in LINEAR_INITS and not kernel:
            max_rank = min(out, channels)
            if spec.rank > max_rank:
                raise AdapterError(
                    f"--adapter.init {init}: rank {spec.rank}; the layer has at most {max_rank}"
                )
            if init == "orthogonal" and spec.rank % 2:
                raise AdapterError(
                    f"--adapter.init orthogonal: rank {spec.rank}; expected an even rank"
                )
        pointwise = [1] * len(kernel)
        return {
            UP: (out, spec.rank, *pointwise),
            DOWN: (spec.rank, channels, *kernel),
        }

    def make_kernel(
        self,
        op: LayerOp,
        spec: LayerSpec,
        weight: torch.Size,
        names: Iterable[str],
    ) -> Kernel:
        subtracts_start = spec.options.init in LINEAR_INITS and not op.spatial_dims
        return LowRank(op, weight, spec.scaling, subtracts_start)

    def initialize(self, tensors: LayerTensors) -> None:
        """Fill the tensors of a grouped convolution, as PEFT does for other layers."""
        tensors[UP].zero_()
        nn.init.kaiming_uniform_(tensors[DOWN], a=math.sqrt(5))

    def factors(self, tensors: LayerTensors, spec: LayerSpec) -> Factors:
        """Return up and down, with the first values as further ranks if they are subtracted."""
        up, down = tensors[UP], tensors[DOWN]
        if INITIAL_UP in tensors:
            up = torch.cat([up, -tensors[INITIAL_UP]], 1)
            down = torch.cat([down, tensors[INITIAL_DOWN]])
        return up, down

    def layer_class(self, base_layer: nn.Module) -> Callable[..., nn.Module] | None:
        return peft_layer_class(LORA_LAYERS, base_layer)


ALGORITHM = LoRA()
