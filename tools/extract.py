"""`extract`: writes the difference between the denoisers of two models as an adapter."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapter_files import convert
from common.dtypes import DTYPES
from common.errors import ModelError, error_list
from lora_algos.detection import layer_delta, rank_of
from lora_algos.lokr import factorization
from lora_algos.tensors import LayerTensors
from tools.base_model import SUFFIXES, BaseModel, parameter_name
from tools.options import ExtractOptions
from tools.rewrite import Target, print_result, write_adapter
from tools.tables import NO_VALUE, BlockTable

MIN_NORM = 1e-30
"""Keeps divisions by a norm finite."""


def run(options: ExtractOptions) -> int:
    """Extract an adapter; return the exit code."""
    base = BaseModel(options.model_config(options.base))
    tuned = BaseModel(options.model_config(options.tuned))
    check_same_shapes(base, tuned, options)
    extraction = Extraction(base, tuned, options)
    metadata = extraction_metadata(base, options)
    file_format = default_format(base, options)
    target = Target(base, file_format, DTYPES[options.dtype], metadata)
    rounding = write_adapter(Path(options.out), extraction.layers(), target)
    print(extraction.table)
    for name, norm in extraction.omitted_norms.items():
        print(
            f"left out, because {options.algorithm} cannot contain it: {name}, "
            f"|difference| {norm:.4g}"
        )
    print("text encoders and VAE were not compared")
    print_result(options.out, target, rounding)
    return 0


def extraction_metadata(base: BaseModel, options: ExtractOptions) -> dict[str, str]:
    """Return the metadata of the adapter, besides that of its format."""
    title = Path(options.out).stem
    recorded_options = {
        "base": options.base,
        "tuned": options.tuned,
        "algorithm": options.algorithm,
        "rank": options.rank,
        "energy": options.energy,
        "factor": options.factor,
    }
    return {
        **base.family.file_metadata(base.skeleton),
        "ss_sd_model_name": Path(options.base).name,
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "train_lora.extracted": json.dumps(recorded_options),
    }


def default_format(base: BaseModel, options: ExtractOptions) -> str:
    """Return the format that most programs load for this model and algorithm."""
    file_formats = base.family.layer_names.file_formats
    if options.algorithm == "LoRA" and not base.names.original_only:
        return file_formats[0]
    for file_format in file_formats:
        if file_format != "diffusers":
            return file_format
    return file_formats[-1]


def check_same_shapes(base: BaseModel, tuned: BaseModel, options: ExtractOptions) -> None:
    """Raise ModelError naming the parameters that the two models do not have in common."""
    base_shapes = parameter_shapes(base)
    tuned_shapes = parameter_shapes(tuned)
    errors = []
    for name in {**base_shapes, **tuned_shapes}:
        base_shape = base_shapes.get(name, "missing")
        tuned_shape = tuned_shapes.get(name, "missing")
        if base_shape != tuned_shape:
            errors.append(f"{name}: {base_shape} in BASE, {tuned_shape} in TUNED")
    if errors:
        raise ModelError(error_list(f"{options.base} and {options.tuned} differ in shape", errors))


def parameter_shapes(model: BaseModel) -> dict[str, tuple[int, ...]]:
    """Return parameter name -> shape."""
    shapes = {}
    for name, parameter in model.skeleton.named_parameters():
        shapes[name] = tuple(parameter.shape)
    return shapes


@dataclass
class Extraction:
    """The difference between two models, layer by layer."""

    base: BaseModel
    tuned: BaseModel
    options: ExtractOptions
    table: BlockTable = field(default_factory=BlockTable)
    omitted_norms: dict[str, float] = field(default_factory=dict)
    """Parameter that differs but is not in the adapter -> norm of the difference."""

    def layers(self) -> Iterator[tuple[str, LayerTensors]]:
        """Yield the tensors of every layer that differs, and add the layer to the table."""
        for layer in self.base.layers:
            tensors = self._layer_tensors(layer)
            if tensors:
                yield layer, tensors
        self._note_other_parameters()

    def _layer_tensors(self, layer: str) -> LayerTensors:
        """Return the adapter of a layer; empty if the layer does not differ or cannot be
        adapted."""
        delta = self._difference(layer, "weight")
        bias_delta = self._bias_difference(layer)
        if self.options.algorithm != "Full":
            self._note_omitted(f"{layer}.bias", bias_delta)
            bias_delta = None
            if delta.ndim < 2:
                self._note_omitted(f"{layer}.weight", delta)
                return {}
        if not delta.any() and bias_delta is None:
            return {}
        tensors = self._adapt(delta)
        if bias_delta is not None:
            tensors["diff_b"] = bias_delta
        self._add_to_table(layer, tensors, delta)
        return tensors

    def _difference(self, layer: str, suffix: str) -> Tensor:
        """Return the difference of a weight or bias. Raises ModelError if it is not finite."""
        tuned = self.tuned.parameter(layer, suffix)
        delta = tuned - self.base.parameter(layer, suffix)
        if not delta.isfinite().all():
            raise ModelError(
                f"{layer}.{suffix}: not finite (NaN or infinite values) in BASE or TUNED"
            )
        return delta

    def _bias_difference(self, layer: str) -> Tensor | None:
        """Return the difference of a bias; None if the bias does not differ."""
        if not self.base.has_parameter(layer, "bias"):
            return None
        delta = self._difference(layer, "bias")
        return delta if delta.any() else None

    def _note_omitted(self, name: str, delta: Tensor | None) -> None:
        if delta is not None and delta.any():
            self.omitted_norms[name] = float(delta.norm())

    def _note_other_parameters(self) -> None:
        """Note the parameters that belong to no layer, if they differ."""
        layer_parameters = set()
        for layer in self.base.layers:
            for suffix in SUFFIXES:
                layer_parameters.add(parameter_name(layer, suffix))
        for name in self.base.file_keys.keys() - layer_parameters:
            layer, _, suffix = name.rpartition(".")
            delta = self._difference(layer, suffix)
            self._note_omitted(name, delta)

    def _adapt(self, delta: Tensor) -> LayerTensors:
        """Return the difference of a weight as --algorithm requests."""
        algorithm = self.options.algorithm
        if algorithm == "Full":
            return {"diff": delta}
        if algorithm == "LoKr":
            return nearest_kronecker(delta, self.options)
        svd = convert.matrix_svd(delta)
        rank = requested_rank(svd[1], self.options)
        lora, _ = convert.truncated_lora(svd, rank, delta.shape)
        return lora

    def _add_to_table(self, layer: str, tensors: LayerTensors, delta: Tensor) -> None:
        norm = float(delta.norm())
        difference = layer_delta(tensors, delta) - delta
        relative_error = float(difference.norm()) / (norm or 1.0)
        attributes = {
            "algorithm": self.options.algorithm,
            "rank": rank_of(tensors) or NO_VALUE,
        }
        self.table.add(layer, attributes, norm, relative_error)


def requested_rank(singular_values: Tensor, options: ExtractOptions) -> int:
    """Return the rank that --rank or --energy requests; without either, the full rank."""
    if options.energy is not None:
        return convert.rank_for_energy(singular_values, options.energy)
    return options.rank or singular_values.numel()


def nearest_kronecker(delta: Tensor, options: ExtractOptions) -> LayerTensors:
    """Return the LoKr nearest to `delta` (Van Loan and Pitsianis 1993).

    Its factors are the first singular vectors of a matrix that has a block of `delta` in each row.
    With --rank or --energy, w2 is replaced by the nearest matrix of low rank."""
    out_features, in_features, *kernel = delta.shape
    max_side = options.factor or -1
    out_1, out_2 = factorization(out_features, max_side)
    in_1, in_2 = factorization(in_features, max_side)
    kernel_size = math.prod(kernel)
    grid = delta.double().reshape(out_1, out_2, in_1, in_2, kernel_size)
    blocks = grid.transpose(1, 2).reshape(out_1 * in_1, out_2 * in_2 * kernel_size)
    left, right = nearest_outer_product(blocks)
    w1 = left.reshape(out_1, in_1).float()
    w2 = right.reshape(out_2, in_2 * kernel_size)
    if options.rank is not None or options.energy is not None:
        low_rank_tensors = low_rank_w2(w2, options)
        if low_rank_tensors is not None:
            return {"lokr_w1": w1, **low_rank_tensors}
    return {
        "lokr_w1": w1,
        "lokr_w2": w2.reshape(out_2, in_2, *kernel).float().contiguous(),
        "alpha": torch.tensor(1.0),
    }


def nearest_outer_product(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors a (rows,) and b (columns,) of equal norm, whose outer product is nearest to
    the matrix."""
    num_rows, num_columns = matrix.shape
    is_wide = num_rows <= num_columns
    wide_matrix = matrix if is_wide else matrix.T
    gram = wide_matrix @ wide_matrix.T
    short_vector = torch.linalg.eigh(gram).eigenvectors[:, -1]
    long_vector = wide_matrix.T @ short_vector
    root = long_vector.norm().sqrt().clamp_min(MIN_NORM)
    short_vector = short_vector * root
    long_vector = long_vector / root
    return (short_vector, long_vector) if is_wide else (long_vector, short_vector)


def low_rank_w2(w2: Tensor, options: ExtractOptions) -> LayerTensors | None:
    """Return the larger factor of a LoKr as a product; None if its rank is not lower than that of
    the factor."""
    u, s, v = torch.linalg.svd(w2, full_matrices=False)
    rank = requested_rank(s, options)
    if rank >= min(w2.shape):
        return None
    root = s[:rank].sqrt()
    w2_a = u[:, :rank] * root
    w2_b = root[:, None] * v[:rank]
    return {
        "lokr_w2_a": w2_a.float().contiguous(),
        "lokr_w2_b": w2_b.float().contiguous(),
        "alpha": torch.tensor(float(rank)),
    }
