"""`extract`: the difference of two models' denoisers as an adapter."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapter_files import convert
from common.errors import ModelError, error_list
from lora_algos.detection import layer_delta, rank_of
from lora_algos.lokr import factorization
from tools.adapter_file import LayerTensors
from tools.base_model import Model
from tools.options import Extract
from tools.rewrite import DTYPES, Target, write_adapter, written
from tools.tables import Report


def run(options: Extract) -> int:
    """Extracts. Returns the exit code."""
    base, tuned = (Model(options.model_config(path)) for path in (options.base, options.tuned))
    check_alike(base, tuned, options)
    extraction = Extraction(base, tuned, options)
    metadata = {
        **base.family.file_metadata(base.skeleton),
        "ss_sd_model_name": Path(options.base).name,
        "ss_output_name": Path(options.out).stem,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": Path(options.out).stem,
        "train_lora.extracted": json.dumps(
            {
                "base": options.base,
                "tuned": options.tuned,
                "algorithm": options.algorithm,
                "rank": options.rank,
                "energy": options.energy,
                "factor": options.factor,
            }
        ),
    }
    target = Target(base, file_format_for(base, options), DTYPES[options.dtype], metadata)
    rounding = write_adapter(Path(options.out), extraction.layers(), target)
    print(extraction.report)
    for name, norm in extraction.left_out.items():
        print(f"left out, {options.algorithm} has no place for it: {name}, |difference| {norm:.4g}")
    print("text encoders and VAE were not compared")
    print(written(options.out, target, rounding))
    return 0


def file_format_for(base: Model, options: Extract) -> str:
    """The one that the most programs load."""
    file_formats = base.family.file_formats
    if options.algorithm == "LoRA" and not base.names.original_only:
        return file_formats[0]
    return next((name for name in file_formats if name != "diffusers"), file_formats[-1])


def check_alike(base: Model, tuned: Model, options: Extract) -> None:
    """ModelError naming what the two models do not have in common."""
    shapes = [
        {n: tuple(p.shape) for n, p in model.skeleton.named_parameters()} for model in (base, tuned)
    ]
    faults = [
        f"{name}: {shapes[0].get(name, 'missing')} in BASE, {shapes[1].get(name, 'missing')} in TUNED"
        for name in {**shapes[0], **shapes[1]}
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if faults:
        raise ModelError(error_list(f"{options.base} and {options.tuned} differ in shape", faults))


@dataclass
class Extraction:
    """The difference of two models, layer by layer."""

    base: Model
    tuned: Model
    options: Extract
    report: Report = field(default_factory=Report)
    left_out: dict[str, float] = field(default_factory=dict)
    """Parameter that differs and is not in the adapter -> norm of the difference."""

    def layers(self) -> Iterator[tuple[str, LayerTensors]]:
        """The tensors of every layer that differs."""
        for layer in self.base.layers:
            delta = self.difference(layer, "weight")
            bias = self.difference(layer, "bias") if self.base.has(layer, "bias") else None
            bias = None if bias is None or not bias.any() else bias
            if self.options.algorithm != "Full":
                self.note(f"{layer}.bias", bias)
                if delta.ndim < 2:
                    self.note(f"{layer}.weight", delta)
                    continue
                bias = None
            if not delta.any() and bias is None:
                continue
            tensors = {**self.adapter(delta), **({"diff_b": bias} if bias is not None else {})}
            norm = float(delta.norm())
            error = float((layer_delta(tensors, delta) - delta).norm()) / (norm or 1.0)
            words = {"algorithm": self.options.algorithm, "rank": rank_of(tensors) or "-"}
            self.report.add(layer, words, norm, error)
            yield layer, tensors
        inside = {f"{layer}.{kind}" for layer in self.base.layers for kind in ("weight", "bias")}
        for name in self.base.keys.keys() - inside:
            layer, _, kind = name.rpartition(".")
            self.note(name, self.difference(layer, kind))

    def difference(self, layer: str, kind: str) -> Tensor:
        delta = self.tuned.parameter(layer, kind) - self.base.parameter(layer, kind)
        if not delta.isfinite().all():
            raise ModelError(
                f"{layer}.{kind}: not finite (NaN or infinite values) in BASE or TUNED"
            )
        return delta

    def note(self, name: str, delta: Tensor | None) -> None:
        if delta is not None and delta.any():
            self.left_out[name] = float(delta.norm())

    def adapter(self, delta: Tensor) -> LayerTensors:
        """One layer's difference as `--algorithm` asks."""
        options = self.options
        if options.algorithm == "Full":
            return {"diff": delta}
        if options.algorithm == "LoKr":
            return nearest_kronecker(delta, options)
        parts = convert.matrix_svd(delta)
        return convert.truncated_lora(parts, chosen_rank(parts[1], options), delta.shape)[0]


def chosen_rank(singular_values: Tensor, options: Extract) -> int:
    if options.energy is not None:
        return convert.rank_for_energy(singular_values, options.energy)
    return options.rank or singular_values.numel()


def nearest_kronecker(delta: Tensor, options: Extract) -> LayerTensors:
    """The w1 (x) w2 nearest to `delta` (Van Loan and Pitsianis 1993): the first singular vectors of
    its blocks as rows.

    With a rank or an energy, w2 is replaced by the matrix of low rank nearest to it.
    """
    out, channels, *kernel = delta.shape
    (a, b), (c, d) = (factorization(n, options.factor or -1) for n in (out, channels))
    size = math.prod(kernel)
    blocks = delta.double().reshape(a, b, c, d, size).transpose(1, 2).reshape(a * c, b * d * size)
    wide = blocks.shape[0] <= blocks.shape[1]
    gram = blocks @ blocks.T if wide else blocks.T @ blocks  # on the smaller side
    first = torch.linalg.eigh(gram).eigenvectors[:, -1]
    other = (blocks.T if wide else blocks) @ first
    root = other.norm().sqrt().clamp_min(1e-30)
    left, right = (first * root, other / root) if wide else (other / root, first * root)
    w1, w2 = left.reshape(a, c).float(), right.reshape(b, d * size)
    if options.rank is not None or options.energy is not None:
        u, s, v = torch.linalg.svd(w2, full_matrices=False)
        rank = chosen_rank(s, options)
        if rank < min(w2.shape):
            half = s[:rank].sqrt()
            low = {"lokr_w2_a": u[:, :rank] * half, "lokr_w2_b": half[:, None] * v[:rank]}
            return {
                "lokr_w1": w1,
                **{n: t.float().contiguous() for n, t in low.items()},
                "alpha": torch.tensor(float(rank)),
            }
    return {
        "lokr_w1": w1,
        "lokr_w2": w2.reshape(b, d, *kernel).float().contiguous(),
        "alpha": torch.tensor(1.0),
    }
