"""Writes files of quantized weights: GGUF as its own package makes it, and ComfyUI's scaled codes."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from torch import Tensor

ROW = 32
"""Values of a row that Q8_0 divides."""
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def write_gguf(
    path: Path, tensors: dict[str, Tensor], quantization: str, architecture: str = "flux"
) -> dict[str, Tensor]:
    """Writes tensors, the matrices quantized and the others in fp32; returns the values that the file has."""
    writer = gguf.GGUFWriter(str(path), architecture)
    values = {}
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        kind = Type[quantization]
        if tensor.ndim == 2 and tensor.shape[1] % ROW == 0:
            data = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            array = gguf.quants.dequantize(data, kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
        values[name] = torch.from_numpy(array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def write_scaled(
    path: Path,
    tensors: dict[str, Tensor],
    suffix: str = ".scale_weight",
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> dict[str, Tensor]:
    """Writes tensors, the matrices as codes with a scale, of each row for int8; returns the values in fp32."""
    stored, values = {}, {}
    for name, tensor in tensors.items():
        values[name] = stored[name] = tensor.contiguous()
        if tensor.ndim != 2 or not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        largest = tensor.abs().amax(1, keepdim=True) if dtype is torch.int8 else tensor.abs().max()
        scale = largest.clamp_min(1e-12) / (127 if dtype is torch.int8 else FP8_MAX)
        codes = tensor / scale
        codes = codes.round() if dtype is torch.int8 else codes
        stored[name] = codes.to(dtype)
        stored[layer + suffix] = scale.flatten() if dtype is torch.int8 else scale
        stored[f"{layer}.scale_input"] = torch.ones(1)
        if suffix == ".weight_scale":
            stored[f"{layer}.comfy_quant"] = marker(dtype)
        values[name] = stored[name].float() * scale
    stored["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    save_file(stored, path)
    return values


def marker(dtype: torch.dtype) -> Tensor:
    """ComfyUI's JSON in a tensor."""
    name = "int8_tensorwise" if dtype is torch.int8 else str(dtype).removeprefix("torch.")
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
