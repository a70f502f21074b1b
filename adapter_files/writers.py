"""The tensors of a whole adapter under the keys of one file format. What a program could not read
is refused, not written.

    kohya      lora_unet_<layer_>: what ComfyUI, A1111, Forge, kohya's scripts and, for LoRA, diffusers load
    comfyui    diffusion_model.<ComfyUI's own name>, as ComfyUI's trainer writes
    diffusers  unet.<layer>: for load_lora_weights; LoRA and DoRA only
    peft       a folder for PeftModel.from_pretrained: adapter_model.safetensors and adapter_config.json

Layers that the original model has as one weight (to_q, to_k, to_v): comfyui names each by
diffusers' name, under which ComfyUI applies it to its rows; kohya, which has no such names, gets
one adapter of the whole (rows.fused).

In kohya's and ComfyUI's files all LoRA layers have one alpha: diffusers gives attention layers a
wrong one otherwise. A layer's own scaling is then in its lora_up, which is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapter_files import fused_weights
from adapter_files.keys import Names
from adapter_files.normalize import Layers, dora_compensation
from common.errors import AdapterError, error_list
from lora_algos.attach import algorithm_of
from lora_algos.tensors import rank_and_alpha, scaling_of

DORA_NORM = "train_lora.dora_scale"  # metadata: what a dora_scale is meant to be divided by
OF_BASE = "norm of the base weight"


@dataclass
class FileContent:
    """What is written: tensors by key, and what the format adds to the metadata or puts beside the
    file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict | None = None


def write_kohya(layers: Layers, weights: dict[str, Tensor], names: Names) -> FileContent:
    """Parts of fused weights, which have no names there, are fused."""
    groups = names.groups(layers) if names.kohya_is_native else [[layer] for layer in layers]
    return lycoris_named(
        layers, weights, names, [(names.kohya(group[0]), group) for group in groups]
    )


def write_comfyui(layers: Layers, weights: dict[str, Tensor], names: Names) -> FileContent:
    """Parts of fused weights under diffusers' names, but their biases, which ComfyUI loses there."""
    spelt: list[tuple[str, list[str]]] = []
    biases: dict[str, Tensor] = {}
    for group in names.groups(layers):
        if group[0] not in names.rows or not names.by_diffusers:
            spelt.append((names.comfyui(group[0]), group))
            continue
        spelt += [(names.by_diffusers + layer, [layer]) for layer in group]
        parts = {names.rows[layer]: layers[layer] for layer in group}
        fused = fused_weights.fused_bias(parts, names.native_rows(group[0]))
        biases |= {f"{names.comfyui(group[0])}.{name}": tensor for name, tensor in fused.items()}
    own = {
        layer: without_bias(tensors) if layer in names.rows else tensors
        for layer, tensors in layers.items()
    }
    content = lycoris_named(own if biases else layers, weights, names, spelt, names.alphas)
    return FileContent({**content.tensors, **biases}, content.metadata)


def without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "diff_b"}


def lycoris_named(
    layers: Layers,
    weights: dict[str, Tensor],
    names: Names,
    spelt: list[tuple[str, list[str]]],
    alphas: bool = True,
) -> FileContent:
    """`spelt`: what is written under each name. Several layers are fused; a native name has the native rows. Without
    `alphas` a LoRA has the names and the scaling of PEFT's."""
    content = FileContent({})
    stated = [float(t["alpha"]) for t in layers.values() if "lora_up.weight" in t and "alpha" in t]
    shared = next((alpha for alpha in stated if alpha), 1.0)
    for spelling, group in spelt:
        parts = {layer: one_alpha(layers[layer], shared) for layer in group}
        tensors, weight = parts[group[0]], weights[group[0]]
        if spelling in names.native_spellings(group[0]):
            tensors, weight = in_native_rows(parts, weights, names)
        if "lora_magnitude_vector" in tensors:
            # ComfyUI and Forge divide by ||W|| where DoRA says ||W + dW||: the quotient is worked
            # in
            magnitude = tensors.pop("lora_magnitude_vector") / dora_compensation(tensors, weight)
            tensors["dora_scale"] = magnitude.view(-1, *[1] * (weight.ndim - 1))
            content.metadata[DORA_NORM] = OF_BASE
        elif "lora_up.weight" in tensors and not alphas:
            tensors = scaled_peft_tensors(tensors, weight)
        if tensors.keys() <= {"diff", "diff_b", "alpha"}:
            tensors.pop("alpha", None)
        content.tensors |= {f"{spelling}.{name}": tensor for name, tensor in tensors.items()}
    return content


def in_native_rows(
    parts: Layers, weights: dict[str, Tensor], names: Names
) -> tuple[dict[str, Tensor], Tensor]:
    """The adapter of the original model's weight, given those of the layers that are it; and of that weight, where it
    is needed, the values."""
    layer = next(iter(parts))
    if layer in names.swapped:
        return fused_weights.swapped(parts[layer], weights[layer]), fused_weights.swap(
            weights[layer]
        )
    if layer not in names.rows:
        return parts[layer], weights[layer]
    placed = {names.rows[name]: tensors for name, tensors in parts.items()}
    own = {names.rows[name]: weights[name] for name in parts}
    tensors = fused_weights.fused(placed, own, names.native_rows(layer))
    if "lora_magnitude_vector" in tensors:
        return tensors, torch.cat([weight for _, weight in sorted(own.items())])
    return tensors, weights[layer]


def one_alpha(tensors: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A layer with that alpha if it is a LoRA: its own scaling goes into up. Of 0 nothing is a
    multiple: 1 then."""
    if "lora_up.weight" not in tensors:
        return dict(tensors)
    alpha = alpha or 1.0
    up = tensors["lora_up.weight"] * (rank_and_alpha(tensors)[1] / alpha)
    return {**tensors, "lora_up.weight": up, "alpha": torch.tensor(alpha)}


def stored_dtype(key: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of a file in `dtype` is stored in. A magnitude's digits are those of the whole weight: in bf16 they
    would be more than what a short training changes."""
    return (
        torch.float32
        if key.endswith((".alpha", ".dora_scale", ".lora_magnitude_vector"))
        else dtype
    )


def write_diffusers(layers: Layers, weights: dict[str, Tensor], names: Names) -> FileContent:
    refuse(layers, "diffusers", ("LoRA", "DoRA"))
    content = FileContent({})
    for layer, tensors in layers.items():
        parts = scaled_peft_tensors(tensors, weights[layer])
        content.tensors |= {
            f"{names.diffusers(layer)}.{name}": tensor for name, tensor in parts.items()
        }
    return content


def write_peft(layers: Layers, weights: dict[str, Tensor], names: Names) -> FileContent:
    from adapter_files.peft_config import peft_config  # imports PEFT, which is slow

    algorithms = {algorithm_of(tensors) for tensors in layers.values()}
    refuse(layers, "peft", ("LoRA", "DoRA", "LoHa", "LoKr"))
    if any(layer in names.text for layer in layers):
        raise AdapterError(
            "--export.formats peft: a folder of PEFT's is of one model, and text encoders are others"
        )
    if len(algorithms) > 1:
        raise AdapterError(
            f"--export.formats peft: one file of PEFT's holds one algorithm, not {', '.join(sorted(algorithms))}"
        )
    content = FileContent({}, config=peft_config(layers, weights, algorithms.pop()))
    for layer, tensors in layers.items():
        parts = peft_tensors(tensors, weights[layer])
        content.tensors |= {f"{names.peft(layer)}.{name}": tensor for name, tensor in parts.items()}
    return content


def peft_tensors(tensors: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """A layer's tensors under PEFT's names, alpha left out."""
    renamed = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    parts = {renamed.get(name, name): tensor for name, tensor in tensors.items() if name != "alpha"}
    if "lora_magnitude_vector" in parts and weight.ndim > 2:
        parts["lora_magnitude_vector"] = parts["lora_magnitude_vector"].view(
            1, -1, *[1] * (weight.ndim - 2)
        )
    return parts


def scaled_peft_tensors(tensors: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """`peft_tensors` of a LoRA with its scaling in the second factor: without an alpha, diffusers
    scales by 1."""
    parts = peft_tensors(tensors, weight)
    return {**parts, "lora_B.weight": parts["lora_B.weight"] * scaling_of(tensors)}


def refuse(layers: Layers, file_format: str, algorithms: tuple[str, ...]) -> None:
    """AdapterError naming the layers that a format has no tensors for."""
    faults = []
    for layer, tensors in layers.items():
        algorithm = algorithm_of(tensors)
        if algorithm not in algorithms:
            faults.append(f"{layer}: {algorithm}")
        elif "diff_b" in tensors:
            faults.append(f"{layer}: a trained bias")
    if faults:
        only = f"--export.formats {file_format} holds {', '.join(algorithms)} alone; kohya and comfyui hold everything"
        raise AdapterError(
            error_list(f"{only}, --export.convert lora-exact or lora-svd makes LoRAs", faults)
        )


def preferred(file_formats: tuple[str, ...], layers: Layers, names: Names) -> str:
    """The first of these formats that holds the layers for every program; the last one, if none
    does."""
    holds = {
        "diffusers": all(
            plain_lora(t) and layer not in names.native_only for layer, t in layers.items()
        )
    }
    return next((name for name in file_formats if holds.get(name, True)), file_formats[-1])


def plain_lora(tensors: dict[str, Tensor]) -> bool:
    """Whether diffusers' file format, which ComfyUI reads too, says all of a layer to both: not of
    a DoRA."""
    return algorithm_of(tensors) == "LoRA" and "diff_b" not in tensors


WRITERS: dict[str, Callable[[Layers, dict[str, Tensor], Names], FileContent]] = {
    "kohya": write_kohya,
    "comfyui": write_comfyui,
    "diffusers": write_diffusers,
    "peft": write_peft,
}
