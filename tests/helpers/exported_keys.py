"""Adapter files of full-size models without values, for names and shapes alone."""

import torch
from torch import Tensor, nn

from adapter_files import files
from adapter_files.spellings import LayerSpellings
from common.errors import AdapterError
from lora_algos import get_algorithm
from lora_algos.config import AdapterOptions, LayerSpec
from lora_algos.targets import adaptable_layers, norm_layers
from lora_algos.traits import Layers


def spec_for(algorithm: str) -> LayerSpec:
    """Return a spec that fits the layers of large models, which BOFT divides in larger blocks."""
    return LayerSpec(
        4, 2.0, algorithm, AdapterOptions(block_size=256 if algorithm == "BOFT" else 32)
    )


def empty_layers(denoiser: nn.Module, algorithms: dict[str, str], biases: bool) -> Layers:
    """Return the tensors of each layer with its algorithm; norms have the algorithm for norms.

    A layer that the algorithm does not fit is left out."""
    layers: Layers = {}
    for name, layer in {**adaptable_layers(denoiser), **norm_layers(denoiser)}.items():
        if name not in algorithms:
            continue
        spec = spec_for(algorithms[name] if layer.weight.ndim > 1 else "Full")
        try:
            shapes = get_algorithm(spec.algorithm).shapes(spec, layer.weight.shape)
        except AdapterError:
            continue
        tensors: dict[str, Tensor] = {
            key: torch.empty(shape, device="meta") for key, shape in shapes.items()
        }
        if biases and getattr(layer, "bias", None) is not None:
            tensors["diff_b"] = torch.empty(layer.weight.shape[0], device="meta")
        alpha = 0.0 if "oft_blocks" in tensors else spec.alpha
        layers[name] = {**tensors, "alpha": torch.tensor(alpha)}
    return layers


def exported(
    denoiser: nn.Module,
    names: LayerSpellings,
    algorithms: dict[str, str],
    file_format: str,
    biases: bool = True,
) -> dict[str, Tensor]:
    """Return key -> tensor without values. `algorithms`: adapted layer -> algorithm."""
    layers = empty_layers(denoiser, algorithms, biases)
    return files.file_content(layers, denoiser, names, file_format, torch.bfloat16).tensors
