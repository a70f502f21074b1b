"""An adapter file of a full-size model as it would be written, without values: for names and shapes alone."""

import torch
from torch import Tensor, nn

from adapter_files import files
from common.errors import AdapterError
from lora_algos import get_algorithm
from lora_algos.attach import adaptable_layers, norm_layers
from lora_algos.config import AdapterOptions, LayerSpec


def spec_for(algorithm: str) -> LayerSpec:
    """One that fits the layers of large models, whose channels BOFT divides in larger blocks than others do."""
    return LayerSpec(
        4, 2.0, algorithm, AdapterOptions(block_size=256 if algorithm == "BOFT" else 32)
    )


def empty_layers(denoiser: nn.Module, algorithms: dict[str, str], biases: bool) -> files.Layers:
    """The tensors of each layer with the algorithm named for it; norms are trained whole. A layer that the algorithm
    does not fit is left out."""
    layers: files.Layers = {}
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
    names: files.Names,
    algorithms: dict[str, str],
    file_format: str,
    biases: bool = True,
) -> dict[str, Tensor]:
    """Key -> tensor without values. `algorithms`: layer -> algorithm, of those that are adapted."""
    layers = empty_layers(denoiser, algorithms, biases)
    return files.to_file(layers, denoiser, names, file_format, torch.bfloat16).tensors
