"""The update of one layer in another algorithm: exactly, as a LoRA or a whole matrix, or
approximately, as a LoRA of a given rank."""

from typing import NamedTuple

import torch
from torch import Tensor

from adapter_files.normalize import bias_of
from common.errors import AdapterError
from lora_algos.detection import detect_algorithm, layer_delta
from lora_algos.full import DIFF
from lora_algos.lora import LoRA
from lora_algos.low_rank import DOWN, NOT_FINITE, UP, finite_svd, lora_tensors, thin_svd
from lora_algos.tensors import LayerTensors

MIN_NORM = 1e-30


class UpdateSVD(NamedTuple):
    """Singular vectors and values of an update as a matrix (out, in * kernel) = u diag(s) v."""

    u: Tensor
    s: Tensor
    v: Tensor


class NearestLoRA(NamedTuple):
    """A LoRA near an update."""

    tensors: LayerTensors
    error: float
    """||error|| / ||update||."""


def full_tensors(tensors: LayerTensors, weight: Tensor) -> LayerTensors:
    """Return the update of a layer as a matrix."""
    return {DIFF: layer_delta(tensors, weight), **bias_of(tensors)}


def exact_lora(tensors: LayerTensors, weight: torch.Size) -> LayerTensors:
    """Return the LoRA of the same function. Normalization layers are not changed.

    Raises AdapterError if no LoRA of a rank below the layer's has it."""
    if len(weight) < 2:
        return tensors
    algorithm = detect_algorithm(tensors)
    if algorithm.traits.to_lora is None:
        raise AdapterError(
            f"{algorithm.name} is not a LoRA of a rank below the layer's; lora-svd makes an "
            "approximation"
        )
    return {**algorithm.traits.to_lora(tensors, weight), **bias_of(tensors)}


def update_svd(tensors: LayerTensors, weight: Tensor) -> UpdateSVD:
    """Return the SVD of a layer's update.

    An update that is a product of thin factors is decomposed without forming the matrix. Raises
    AdapterError if it is not finite."""
    try:
        lora = exact_lora(tensors, weight.shape)
    except AdapterError:
        lora = {}
    if UP not in lora or DOWN not in lora:
        return matrix_svd(layer_delta(tensors, weight))
    up, down = lora[UP].flatten(1), lora[DOWN].flatten(1)
    dtype = up.dtype
    rank, fan_in = down.shape
    if rank >= min(up.shape[0], fan_in):
        return matrix_svd(layer_delta(tensors, weight))
    scaling = LoRA.traits.scaling(lora)
    u, s, v = thin_svd(up * scaling, down)
    svd = UpdateSVD(u.to(dtype), s.to(dtype), v.to(dtype))
    if not svd.s.isfinite().all():
        raise AdapterError(NOT_FINITE)
    return svd


def matrix_svd(delta: Tensor) -> UpdateSVD:
    """Return the SVD of an update. Raises AdapterError if it is not finite."""
    if not delta.isfinite().all():
        raise AdapterError(NOT_FINITE)
    return UpdateSVD(*finite_svd(delta.flatten(1)))


def truncated_lora(
    svd: UpdateSVD,
    rank: int,
    weight: torch.Size,
) -> NearestLoRA:
    """Return the nearest LoRA of at most that rank to a decomposed update."""
    u, s, v = svd
    root = s[:rank].sqrt()
    up = u[:, :rank] * root
    down = root[:, None] * v[:rank]
    lost_norm = s[rank:].norm()
    error = lost_norm / s.norm().clamp_min(MIN_NORM)
    return NearestLoRA(lora_tensors(up, down, weight), float(error))


def nearest_lora(
    tensors: LayerTensors,
    weight: Tensor,
    rank: int,
) -> NearestLoRA:
    """Return the nearest LoRA of at most `rank` to a layer.

    Normalization layers are not changed."""
    if weight.ndim < 2:
        return NearestLoRA(tensors, 0.0)
    svd = update_svd(tensors, weight)
    lora, error = truncated_lora(svd, rank, weight.shape)
    return NearestLoRA({**lora, **bias_of(tensors)}, error)


def rank_for_energy(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank that keeps this share of the sum of squares."""
    squares = singular_values.square()
    total = squares.sum().clamp_min(MIN_NORM)
    share = squares.cumsum(0) / total
    num_below = int((share < energy).sum())
    return min(num_below + 1, singular_values.numel())
