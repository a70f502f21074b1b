"""Quantization of a denoiser's frozen weights: the formats, and the layers that get one."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from models.blocks import inner_blocks
from models.config import Quantization
from models.quantized_weight import Format, QuantizedWeight, StoredTensors

CODES, SCALES, PAIRS = "codes", "scales", "pairs"
"""Names of stored tensors. PAIRS, (256, 2): the levels of the two codes in each byte."""
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
INT8_MAX = 127
SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny
NF4_BLOCK = 64
"""Number of values that share a scale in nf4, as in QLoRA (arXiv 2305.14314)."""
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution, scaled to 1, from appendix E of QLoRA."""


def row_scales(matrix: Tensor, largest_code: float) -> Tensor:
    """Return (out, 1) in bf16: each row's largest value gets about the largest code.

    Codes are made for the rounded scale, so that its rounding costs nothing."""
    largest = matrix.abs().amax(1, keepdim=True)
    return bf16_scales(largest.float() / largest_code)


def bf16_scales(scales: Tensor) -> Tensor:
    """Return scales in bf16, and for zeros the smallest normal number."""
    nonzero_scales = scales.clamp_min(SMALLEST_SCALE)
    return nonzero_scales.bfloat16()


def scaled_rows(stored: StoredTensors, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return codes times the scale of their row."""
    codes = stored[CODES].to(dtype)
    return codes.mul_(stored[SCALES])  # in place: no second matrix


def to_fp8(matrix: Tensor) -> StoredTensors:
    """Return codes in float8_e4m3fn, with a scale for each row."""
    scales = row_scales(matrix, FP8_MAX)
    scaled = matrix.float() / scales.float()
    codes = scaled.clamp(-FP8_MAX, FP8_MAX)
    return {
        CODES: codes.to(torch.float8_e4m3fn),
        SCALES: scales,
    }


def to_int8(matrix: Tensor) -> StoredTensors:
    """Return rounded codes from -127 to 127, with a scale for each row."""
    scales = row_scales(matrix, INT8_MAX)
    scaled = matrix.float() / scales.float()
    codes = scaled.round().clamp(-INT8_MAX, INT8_MAX)
    return {
        CODES: codes.to(torch.int8),
        SCALES: scales,
    }


def to_nf4(matrix: Tensor) -> StoredTensors:
    """Return 4-bit codes, two in a byte, with a scale for each block of NF4_BLOCK values."""
    blocks = matrix.float().reshape(-1, NF4_BLOCK)
    scales = bf16_scales(blocks.abs().amax(1))
    scaled = blocks / scales.float()[:, None]
    levels = torch.tensor(NF4_LEVELS, device=matrix.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8)
    high, low = codes.reshape(-1, 2).unbind(1)
    return {
        CODES: high << 4 | low,
        SCALES: scales,
        # stored, because a constant would be copied to the GPU each time
        PAIRS: torch.cartesian_prod(levels, levels),
    }


def nf4_values(stored: StoredTensors, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the matrix of `to_nf4`."""
    pairs = stored[PAIRS].to(dtype)
    levels = pairs.index_select(0, stored[CODES].int())
    blocks = levels.view(-1, NF4_BLOCK)
    scales = stored[SCALES].to(dtype)
    return blocks.mul_(scales[:, None]).view(shape)


FORMATS = {
    format.name: format
    for format in (
        Format("fp8", to_fp8, scaled_rows),
        Format("int8", to_int8, scaled_rows),
        Format("nf4", to_nf4, nf4_values),
    )
}


@torch.no_grad()
def quantize(matrix: Tensor, format: Format, device: torch.device | None = None) -> QuantizedWeight:
    """Return a weight (out, in) in a format, where `matrix` is. It is computed on `device`."""
    stored = format.quantize(matrix.detach().to(device))
    for name, tensor in stored.items():
        stored[name] = tensor.to(matrix.device)
    return QuantizedWeight(format, stored, matrix.shape, matrix.dtype)


def quantize_blocks(
    blocks: Mapping[str, nn.Module],
    quantization: Quantization,
    device: torch.device | None = None,
) -> int:
    """Quantize the weights of the Linear layers in blocks, one by one; return their number.

    Embeddings, output layers and text encoders stay as they were. So do biases, norms, and weights
    that NF4_BLOCK does not divide. `device`: where the codes are computed."""
    layers = quantizable_layers(blocks)
    quantize_layers(layers.values(), quantization, device)
    return len(layers)


def quantize_layers(
    layers: Iterable[nn.Linear],
    quantization: Quantization,
    device: torch.device | None = None,
) -> None:
    """Quantize the weights of layers, one by one. `device`: where the codes are computed."""
    for layer in layers:
        weight = quantize(layer.weight, FORMATS[quantization], device)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def quantizable_layers(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """Return the layers in blocks whose weights can be in any of the formats, by name.

    A layer with several names has the first one. Weights that are quantized are left out."""
    layers: dict[str, nn.Linear] = {}
    seen_layers: set[nn.Module] = set()
    for block_name, block in inner_blocks(blocks).items():
        for name, layer in block.named_modules(prefix=block_name):
            if layer in seen_layers or not is_quantizable(layer):
                continue
            seen_layers.add(layer)
            layers[name] = layer
    return layers


def is_encoder_weight(key: str, weight: Tensor) -> bool:
    """Return whether a text encoder's weight can be in any of the formats.

    These are the matrices in lists of layers, without tables such as T5's of relative positions."""
    is_numbered = any(part.isdigit() for part in key.split("."))
    is_matrix = key.endswith(".weight") and weight.ndim == 2
    is_table = "bias.weight" in key
    return is_numbered and is_matrix and not is_table and weight.numel() % NF4_BLOCK == 0


def is_quantizable(layer: nn.Module) -> bool:
    """Return whether the weight of a layer can be in any of the formats, and is in none."""
    if not isinstance(layer, nn.Linear):
        return False
    if isinstance(layer.weight, QuantizedWeight):
        return False
    return layer.weight.numel() % NF4_BLOCK == 0
