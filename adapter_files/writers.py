"""The tensors of a whole adapter under the keys of one file format.

    kohya      lora_unet_<layer_>: for ComfyUI, A1111, Forge, kohya's scripts and, for LoRA, diffusers
    comfyui    diffusion_model.<ComfyUI's name>: as ComfyUI's trainer writes
    diffusers  unet.<layer>: for load_lora_weights; LoRA and DoRA only
    peft       a folder for PeftModel.from_pretrained: adapter_model.safetensors and adapter_config.json

A writer raises AdapterError for an adapter that the format's programs could not read.

The original model has some layers as one weight (to_q, to_k, to_v). The format comfyui names each
layer by diffusers' name, under which ComfyUI applies the adapter to the layer's rows, unless ComfyUI
does not know that name. The format kohya has names for the whole weight only, so its adapter is
written (fused_weights.fuse).

In both formats all LoRA layers have one alpha, because diffusers applies a wrong one to attention
layers otherwise. A layer's own scaling is then in its lora_up, which is exact.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapter_files import fused_weights
from adapter_files.normalize import bias_of
from adapter_files.peft_config import peft_config, peft_tensors
from adapter_files.spellings import LayerSpellings
from common.errors import AdapterError, error_list
from lora_algos.detection import all_algorithms, detect_algorithm, find_algorithm
from lora_algos.tensors import ALPHA, BIAS, LayerTensors
from lora_algos.traits import FileTraits, Layers, Weights
from models.layer_names.names import swap_halves

FORMATS_READ_BY_PEFT = ("diffusers", "peft")
"""Formats whose layers PEFT computes."""
FORMATS_WITH_SHARED_ALPHA = ("kohya", "comfyui")
"""Formats in which all LoRA layers have one alpha."""


@dataclass
class FileContent:
    """Content of an adapter file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """Metadata that the format needs."""
    config: dict[str, Any] | None = None
    """PEFT's config, if the format is a folder of PEFT."""


class Spelling(NamedTuple):
    """A name in a file, and the layers whose adapters are written under it as one."""

    name: str
    layers: list[str]


def write_kohya(layers: Layers, weights: Weights, names: LayerSpellings) -> FileContent:
    """Return the content of a file with kohya's names."""
    groups = names.groups(layers) if names.kohya_uses_original else [[layer] for layer in layers]
    spellings = [Spelling(names.kohya(group[0]), group) for group in groups]
    return spelled_content(layers, weights, names, spellings)


def write_comfyui(layers: Layers, weights: Weights, names: LayerSpellings) -> FileContent:
    """Return the content of a file with ComfyUI's names.

    Biases of fused weights are under the original names, because ComfyUI ignores them elsewhere."""
    spellings: list[Spelling] = []
    fused_biases: dict[str, Tensor] = {}
    for group in names.groups(layers):
        first_layer = group[0]
        if not names.comfyui_knows_slice(first_layer):
            spellings.append(Spelling(names.comfyui(first_layer), group))
            continue
        spellings += [Spelling(names.comfyui_prefix + layer, [layer]) for layer in group]
        parts_of_weight = {names.slices[layer]: layers[layer] for layer in group}
        num_rows = names.num_fused_rows(first_layer)
        bias = fused_weights.fuse_biases(parts_of_weight, num_rows)
        for name, tensor in bias.items():
            fused_biases[f"{names.comfyui(first_layer)}.{name}"] = tensor
    if fused_biases:
        slices = {layer: without_bias(layers[layer]) for layer in layers if layer in names.slices}
        layers = {**layers, **slices}
    content = spelled_content(layers, weights, names, spellings, names.writes_alpha)
    content.tensors |= fused_biases
    return content


def without_bias(tensors: LayerTensors) -> LayerTensors:
    """Return a layer's tensors without the change of its bias."""
    return {name: tensor for name, tensor in tensors.items() if name != BIAS}


def spelled_content(
    layers: Layers,
    weights: Weights,
    names: LayerSpellings,
    spellings: list[Spelling],
    writes_alpha: bool = True,
) -> FileContent:
    """Return the content of a file with one adapter under each spelling.

    An original name has the rows of the original weight. Without `writes_alpha`, a LoRA has PEFT's
    names and its scaling in a factor."""
    content = FileContent({})
    alpha = shared_alpha(layers)
    for spelling in spellings:
        group = {layer: with_shared_alpha(layers[layer], alpha) for layer in spelling.layers}
        first_layer = spelling.layers[0]
        tensors, weight = group[first_layer], weights[first_layer]
        if spelling.name in names.original_spellings(first_layer):
            tensors, weight = original_adapter(group, weights, names)
        traits = file_traits(tensors)
        if traits.is_portable_in_diffusers_format and not writes_alpha:
            tensors = scaled_peft_tensors(tensors, weight)
        else:
            tensors, metadata = traits.export_for_weight(tensors, weight)
            content.metadata |= metadata
        for name, tensor in tensors.items():
            if name != ALPHA or traits.writes_alpha:
                content.tensors[f"{spelling.name}.{name}"] = tensor
    return content


def file_traits(tensors: LayerTensors) -> FileTraits:
    """Return the traits of a layer's algorithm; a layer may also have the change of a bias alone."""
    algorithm = find_algorithm(tensors)
    return FileTraits(writes_alpha=False) if algorithm is None else algorithm.traits.files


def original_adapter(
    group: Layers, weights: Weights, names: LayerSpellings
) -> tuple[LayerTensors, Tensor]:
    """Return the adapter of the original model's weight, given those of its layers, and the weight.

    The weight has values only if the algorithm needs them."""
    layer = next(iter(group))
    weight = weights[layer]
    if layer in names.swapped:
        tensors = fused_weights.swap_adapter(group[layer], weight)
        return tensors, swap_halves(weight)
    if layer not in names.slices:
        return group[layer], weight
    slices = {names.slices[name]: tensors for name, tensors in group.items()}
    slice_weights = {names.slices[name]: weights[name] for name in group}
    tensors = fused_weights.fuse(slices, slice_weights, names.num_fused_rows(layer))
    algorithm = find_algorithm(tensors)
    if algorithm is not None and not algorithm.traits.zero_rows_change_nothing:
        # only all rows together were fused
        weight = torch.cat([weight for _, weight in sorted(slice_weights.items())])
    return tensors, weight


def shared_alpha(layers: Layers) -> float:
    """Return the first alpha, except 0, of the layers that need the same one."""
    for tensors in layers.values():
        if file_traits(tensors).shared_alpha_tensor and ALPHA in tensors:
            alpha = float(tensors[ALPHA])
            if alpha:
                return alpha
    return 1.0


def with_shared_alpha(tensors: LayerTensors, alpha: float) -> LayerTensors:
    """Return a layer with that alpha; its own scaling is moved into a factor.

    Layers of algorithms that do not need the same alpha are not changed. With alpha 0 no scaling
    could be moved, so it becomes 1."""
    name = file_traits(tensors).shared_alpha_tensor
    if not name:
        return dict(tensors)
    alpha = alpha or 1.0
    _, own_alpha = detect_algorithm(tensors).traits.rank_and_alpha(tensors)
    return {**tensors, name: tensors[name] * (own_alpha / alpha), ALPHA: torch.tensor(alpha)}


def storage_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor in a file of `dtype`.

    A tensor with the digits of the whole weight is stored in fp32: in bf16 its rounding would
    exceed the change of a short training."""
    name = key.rpartition(".")[2]
    return torch.float32 if name in fp32_tensors() else dtype


def content_metadata_keys() -> set[str]:
    """Return the keys of metadata that only belong to the content of one file."""
    keys: set[str] = set()
    for algorithm in all_algorithms():
        keys |= {*algorithm.traits.files.metadata_keys}
    return keys


def fp32_tensors() -> set[str]:
    """Return the names of tensors that are stored in fp32."""
    names = {ALPHA}
    for algorithm in all_algorithms():
        names |= {*algorithm.traits.fp32_tensors}
    return names


def write_diffusers(layers: Layers, weights: Weights, names: LayerSpellings) -> FileContent:
    """Return the content of a file for diffusers."""
    supported = [a.name for a in all_algorithms() if a.traits.files.is_in_diffusers_format]
    check_supported(layers, "diffusers", supported)
    content = FileContent({})
    for layer, tensors in layers.items():
        for name, tensor in scaled_peft_tensors(tensors, weights[layer]).items():
            content.tensors[f"{names.diffusers(layer)}.{name}"] = tensor
    return content


def write_peft(layers: Layers, weights: Weights, names: LayerSpellings) -> FileContent:
    """Return the content of a folder of PEFT."""
    supported = [a.name for a in all_algorithms() if a.traits.files.peft is not None]
    check_supported(layers, "peft", supported)
    if any(layer in names.text_encoders for layer in layers):
        raise AdapterError(
            "--export.formats peft: the adapter has layers of text encoders; a folder of PEFT "
            "holds the adapter of one model"
        )
    algorithms = {detect_algorithm(tensors) for tensors in layers.values()}
    if len(algorithms) > 1:
        algorithm_names = ", ".join(sorted(algorithm.name for algorithm in algorithms))
        raise AdapterError(
            f"--export.formats peft: the adapter has layers of {algorithm_names}; a folder of PEFT "
            "holds one algorithm"
        )
    content = FileContent({}, config=peft_config(layers, weights, algorithms.pop()))
    for layer, tensors in layers.items():
        for name, tensor in peft_tensors(tensors, weights[layer]).items():
            content.tensors[f"{names.peft(layer)}.{name}"] = tensor
    return content


def scaled_peft_tensors(tensors: LayerTensors, weight: Tensor) -> LayerTensors:
    """Return a layer's tensors under PEFT's names with its scaling in a factor.

    Without an alpha, diffusers scales by 1."""
    traits = detect_algorithm(tensors).traits
    name = traits.files.shared_alpha_tensor
    scaled_tensors = {**tensors, name: tensors[name] * traits.scaling(tensors)}
    return peft_tensors(scaled_tensors, weight)


def check_supported(layers: Layers, file_format: str, algorithms: list[str]) -> None:
    """Raise AdapterError naming the layers for which a format has no tensors."""
    errors = []
    for layer, tensors in layers.items():
        algorithm = detect_algorithm(tensors).name
        if algorithm not in algorithms:
            errors.append(f"{layer}: {algorithm}")
        elif BIAS in tensors:
            errors.append(f"{layer}: a trained bias")
    if errors:
        heading = (
            f"--export.formats {file_format} only holds {', '.join(algorithms)}; kohya and comfyui "
            "hold everything, --export.convert lora-exact or lora-svd makes LoRAs"
        )
        raise AdapterError(error_list(heading, errors))


def preferred_format(file_formats: tuple[str, ...], layers: Layers, names: LayerSpellings) -> str:
    """Return the first of these formats that all programs read alike; the last one if none is."""
    for file_format in file_formats:
        if file_format != "diffusers" or is_portable_in_diffusers_format(layers, names):
            return file_format
    return file_formats[-1]


def is_portable_in_diffusers_format(layers: Layers, names: LayerSpellings) -> bool:
    """Return whether ComfyUI, too, computes the same function from the format `diffusers`."""
    return not any(
        layer in names.original_only
        or bias_of(tensors)
        or not detect_algorithm(tensors).traits.files.is_portable_in_diffusers_format
        for layer, tensors in layers.items()
    )
