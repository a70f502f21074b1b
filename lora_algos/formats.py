"""The only place that knows file keys. One flavour so far: kohya's names, which ComfyUI, A1111, Forge and diffusers all
load for SD 1.x and 2.x: `lora_unet_<layer with _ for .>.<tensor>`, with one alpha for all layers of a file.

One alpha because diffusers maps per-layer alphas of attention layers wrongly; a layer whose own alpha differs has the
quotient folded into its up weight, which is exact.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_algos.base import Adapted, adaptable_layers
from lora_algos.config import AdapterError

PREFIX = "lora_unet_"


def file_key(layer: str) -> str:
    """`down_blocks.0.attentions.0.proj_in` -> `lora_unet_down_blocks_0_attentions_0_proj_in`."""
    return PREFIX + layer.replace(".", "_")


def to_file(adapted: Adapted, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors under the keys of a file, in `dtype`."""
    specs = adapted.specs()
    alpha = next(iter(specs.values())).alpha
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapted.state_dict().items():
        layer, suffix = split(name, specs)
        if suffix == "lora_up.weight" and specs[layer].alpha != alpha:
            tensor = tensor * (specs[layer].alpha / alpha)
        tensors[f"{file_key(layer)}.{suffix}"] = tensor.to(dtype).contiguous()
    for layer in specs:
        tensors[f"{file_key(layer)}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def split(name: str, layers: dict) -> tuple[str, str]:
    """`<layer>.<tensor>` at the dot where the layer ends."""
    layer = name
    while layer not in layers:
        layer = layer.rpartition(".")[0]
    return layer, name[len(layer) + 1 :]


def from_file(tensors: dict[str, Tensor], model: torch.nn.Module) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A file's tensors, in fp32, by the layer of `model` they belong to; and a line for each that belongs to none."""
    layer_of = {file_key(name): name for name in adaptable_layers(model)}
    result: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        prefix, _, suffix = key.partition(".")
        if prefix in layer_of:
            result.setdefault(layer_of[prefix], {})[suffix] = tensor.float()
        else:
            unknown.append(f"{key} {tuple(tensor.shape)}: no such layer in the model")
    return result, unknown


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file; AdapterError if it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a readable .safetensors file: {error}") from error


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a .safetensors file."""
    return save(tensors, metadata)
