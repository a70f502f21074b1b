"""The formats of GGUF files: blocks of codes with scales, as llama.cpp defines them (ggml-quants.h).

A matrix is stored as bytes (out, bytes of a row). A row consists of blocks, a block of 32 or 256
values. All formulas are in fp32; the values are rounded once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ModelError
from models.quantized_weight import Format, StoredTensors

BLOCKS = "blocks"
"""Name of the stored tensor."""
SMALL_BLOCK = 32
LARGE_BLOCK = 256
NUM_SCALE_BYTES = 12
"""Bytes of a large block that hold 16 scales of 6 bits, or 8 scales and 8 offsets."""


def split(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Return parts of all blocks (N, bytes). The last part is the remainder."""
    remainder = blocks.shape[1] - sum(sizes)
    return blocks.split([*sizes, remainder], 1)


def half_floats(data: Tensor) -> Tensor:
    """Return (N, bytes) as numbers (N, bytes / 2) in fp32."""
    numbers = data.contiguous().view(torch.float16)
    return numbers.float()


def signed_bytes(data: Tensor) -> Tensor:
    """Return bytes as numbers from -128 to 127."""
    return data.contiguous().view(torch.int8)


def nibbles(data: Tensor) -> Tensor:
    """Return the low halves of bytes (N, groups, bytes), then their high halves, in each group."""
    low = data & 15
    high = data >> 4
    return torch.cat([low, high], 2)


def bit_planes(data: Tensor, width: int) -> Tensor:
    """Return (N, 8 / width, bytes): the lowest bits of all bytes, then the next ones.

    `width`: bits of a value."""
    mask = 2**width - 1
    planes = []
    for position in range(0, 8, width):
        planes.append(data >> position & mask)
    return torch.stack(planes, 1)


def bits(data: Tensor) -> Tensor:
    """Return the bits of (N, bytes), byte after byte, the lowest first, as (N, 8 * bytes)."""
    planes = bit_planes(data, 1)
    return planes.transpose(1, 2).flatten(1)


def small_nibbles(codes: Tensor) -> Tensor:
    """Return the codes of small blocks, (N, SMALL_BLOCK)."""
    return nibbles(codes[:, None]).flatten(1)


def q8_0(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    2 bytes   scale
    32 bytes  codes from -128 to 127"""
    scale, codes = split(blocks, 2)
    return half_floats(scale) * signed_bytes(codes)


def q4_0(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    2 bytes   scale
    16 bytes  codes from 0 to 15, which mean -8 to 7"""
    scale, low = split(blocks, 2)
    codes = small_nibbles(low).float() - 8
    return half_floats(scale) * codes


def q4_1(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    4 bytes   scale and offset
    16 bytes  codes from 0 to 15"""
    scale, offset, low = split(blocks, 2, 2)
    scaled = half_floats(scale) * small_nibbles(low)
    return scaled + half_floats(offset)


def five_bits(high: Tensor, low: Tensor) -> Tensor:
    """Return codes of 5 bits of small blocks: their high bits (N, 4) and the four low ones."""
    high_bits = bits(high) << 4
    return small_nibbles(low) | high_bits


def q5_0(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    2 bytes   scale
    4 bytes   the fifth bit of each code
    16 bytes  the other bits of codes from 0 to 31, which mean -16 to 15"""
    scale, high, low = split(blocks, 2, 4)
    codes = five_bits(high, low).float() - 16
    return half_floats(scale) * codes


def q5_1(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    4 bytes   scale and offset
    4 bytes   the fifth bit of each code
    16 bytes  the other bits of codes from 0 to 31"""
    scale, offset, high, low = split(blocks, 2, 2, 4)
    scaled = half_floats(scale) * five_bits(high, low)
    return scaled + half_floats(offset)


def six_bit_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return 8 scales and 8 offsets (N, 8), packed into NUM_SCALE_BYTES.

    The first four of both have a byte each, whose two highest bits belong to the last four. The
    other bits of these are in the last bytes, a scale and an offset in each."""
    scale_bytes, offset_bytes, low_bits = data.split(4, 1)
    last_scales = low_bits & 15 | scale_bytes >> 6 << 4
    last_offsets = low_bits >> 4 | offset_bytes >> 6 << 4
    scales = torch.cat([scale_bytes & 63, last_scales], 1)
    offsets = torch.cat([offset_bytes & 63, last_offsets], 1)
    return scales, offsets


def with_offsets(factors: Tensor, scales: Tensor, offsets: Tensor, codes: Tensor) -> Tensor:
    """Return the values of groups: codes (N, groups, values) times scales, less offsets.

    `factors`: (N, 2), by which a block's scales and offsets (N, groups) are multiplied."""
    scale_factor, offset_factor = factors.split(1, 1)
    scale = scale_factor * scales
    offset = offset_factor * offsets
    return scale[:, :, None] * codes - offset[:, :, None]


def four_bits(low: Tensor) -> Tensor:
    """Return the low bits of large blocks (N, 8, 32), which have 64 codes in each 32 bytes."""
    groups = low.unflatten(1, (4, 32))
    return nibbles(groups).view(-1, 8, 32)


def two_bits(low: Tensor) -> Tensor:
    """Return the low bits of large blocks (N, 8, 32), which have 128 codes in each 32 bytes."""
    halves = low.reshape(-1, 32)
    return bit_planes(halves, 2).view(-1, 8, 32)


def q4_k(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    4 bytes    factors of scales and offsets
    12 bytes   scales and offsets of 8 groups
    128 bytes  codes from 0 to 15"""
    factors, packed, low = split(blocks, 4, NUM_SCALE_BYTES)
    scales, offsets = six_bit_pairs(packed)
    return with_offsets(half_floats(factors), scales, offsets, four_bits(low))


def q5_k(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    4 bytes    factors of scales and offsets
    12 bytes   scales and offsets of 8 groups
    32 bytes   the fifth bit of each code
    128 bytes  the other bits of codes from 0 to 31"""
    factors, packed, high, low = split(blocks, 4, NUM_SCALE_BYTES, 32)
    scales, offsets = six_bit_pairs(packed)
    codes = four_bits(low) | bit_planes(high, 1) << 4
    return with_offsets(half_floats(factors), scales, offsets, codes)


def q6_k(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    128 bytes  the four low bits of codes from 0 to 63, which mean -32 to 31
    64 bytes   their two high bits
    16 bytes   scales of 16 groups
    2 bytes    the factor of the scales"""
    low, high, scales, factor = split(blocks, 128, 64, 16)
    halves = low.unflatten(1, (2, 64))
    low_bits = nibbles(halves).view(-1, 8, 32)
    codes = low_bits | two_bits(high) << 4
    scale = half_floats(factor) * signed_bytes(scales)
    numbers = codes.view(-1, 16, 16).float() - 32
    return scale[:, :, None] * numbers


def q2_k(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    16 bytes  scales and offsets of 16 groups, four bits each
    64 bytes  codes from 0 to 3
    4 bytes   factors of scales and offsets"""
    packed, low, factors = split(blocks, 16, 64)
    scales = packed & 15
    offsets = packed >> 4
    codes = two_bits(low).view(-1, 16, 16)
    return with_offsets(half_floats(factors), scales, offsets, codes)


def q3_k(blocks: Tensor) -> Tensor:
    """Return the values of blocks with

    32 bytes  the third bit of each code
    64 bytes  the other bits of codes from 0 to 7, which mean -4 to 3
    12 bytes  scales of 16 groups, from 0 to 63, which mean -32 to 31
    2 bytes   the factor of the scales"""
    high, low, packed, factor = split(blocks, 32, 64, NUM_SCALE_BYTES)
    codes = two_bits(low) | bit_planes(high, 1) << 2
    low_scales, high_scales = packed.split([8, 4], 1)
    high_bits = bit_planes(high_scales, 2).flatten(1) << 4
    scales = small_nibbles(low_scales) | high_bits
    scale = half_floats(factor) * (scales.float() - 32)
    numbers = codes.view(-1, 16, 16).float() - 4
    return scale[:, :, None] * numbers


@dataclass(frozen=True)
class BlockType:
    """A type of tensor in GGUF files whose rows consist of blocks."""

    name: str
    num_values: int
    """Values of a block."""
    num_bytes: int
    """Bytes of a block."""
    block_values: Callable[[Tensor], Tensor]
    """Blocks (N, num_bytes) -> values, which are in order when they are flattened."""

    def values(self, stored: StoredTensors, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the matrix."""
        blocks = stored[BLOCKS].view(-1, self.num_bytes)
        return self.block_values(blocks).to(dtype).view(shape)

    def refuse(self, matrix: Tensor) -> StoredTensors:
        """Raise ModelError: nothing here computes codes of this type."""
        raise ModelError(
            f"a weight in {self.name} cannot be changed. Load the model with plain weights first"
        )

    @property
    def format(self) -> Format:
        return Format(self.name, self.refuse, self.values)


BLOCK_TYPES = {
    block_type.name: block_type
    for block_type in (
        BlockType("Q4_0", SMALL_BLOCK, 18, q4_0),
        BlockType("Q4_1", SMALL_BLOCK, 20, q4_1),
        BlockType("Q5_0", SMALL_BLOCK, 22, q5_0),
        BlockType("Q5_1", SMALL_BLOCK, 24, q5_1),
        BlockType("Q8_0", SMALL_BLOCK, 34, q8_0),
        BlockType("Q2_K", LARGE_BLOCK, 84, q2_k),
        BlockType("Q3_K", LARGE_BLOCK, 110, q3_k),
        BlockType("Q4_K", LARGE_BLOCK, 144, q4_k),
        BlockType("Q5_K", LARGE_BLOCK, 176, q5_k),
        BlockType("Q6_K", LARGE_BLOCK, 210, q6_k),
    )
}
"""Types by their names in the gguf package."""
GGUF_FORMATS = {name: block_type.format for name, block_type in BLOCK_TYPES.items()}
