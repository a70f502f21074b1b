"""A denoiser that is quantized while it is read: the same weights, and little memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.family_cases import cases, family_of
from helpers.ldm import save_single_file
from helpers.project import BASE, PROJECT
from torch import nn

from models.base import ModelFamily
from models.block_format import BlockFormat
from models.config import ModelConfig
from models.detect import get_family
from models.quantization import FORMATS, quantize_blocks
from models.quantized_weight import QuantizedWeight, stored_parts

DTYPE = torch.bfloat16


def assert_same_weights(first: nn.Module, second: nn.Module) -> int:
    """Compares all weights; returns the number of quantized ones."""
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    num_quantized = 0
    for (name, weight), (other_name, other_weight) in pairs:
        assert name == other_name
        assert type(weight.data) is type(other_weight.data), name
        assert weight.dtype == other_weight.dtype, name
        num_quantized += isinstance(weight, QuantizedWeight)
        parts = zip(stored_parts(weight), stored_parts(other_weight), strict=True)
        assert all(torch.equal(part, other_part) for part, other_part in parts), name
    for (name, buffer), (_, other_buffer) in zip(
        first.named_buffers(), second.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other_buffer), name
    return num_quantized


def check_family(family: ModelFamily, quantization: str) -> None:
    expected = family.load_denoiser(DTYPE)
    num_layers = quantize_blocks(family.blocks(expected, 1), quantization)
    loaded = family.load_denoiser(DTYPE, BlockFormat(quantization, torch.device("cpu")))
    assert assert_same_weights(loaded, expected) == num_layers > 0
    assert quantize_blocks(family.blocks(loaded, 1), quantization) == 0
    assert loaded.config.get("quantization_config") is None
    assert not getattr(loaded, "is_quantized", False)


@pytest.mark.parametrize("quantization", FORMATS)
def test_the_weights_are_those_of_a_model_that_is_quantized_later(quantization):
    check_family(get_family(ModelConfig(path=str(BASE))), quantization)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_family_loads_quantized(case):
    check_family(family_of(case), "nf4")


def test_a_single_file_loads_quantized(tmp_path):
    path = tmp_path / "model.safetensors"
    save_single_file(BASE, path, torch.float32)
    check_family(get_family(ModelConfig(path=str(path), config=str(BASE))), "int8")


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_base_that_is_stored_in_float8_loads_quantized(tmp_path, quantization):
    family = get_family(ModelConfig(path=str(BASE)))
    unet = family.load_denoiser(DTYPE).to(torch.float8_e4m3fn)
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    check_family(get_family(ModelConfig(path=str(folder))), quantization)


MEASURE = """
import sys, threading
import torch
from diffusers import SD3Transformer2DModel
from benchmarks.memory import anonymous_memory
from models.block_format import BlockFormat
from models.blocks import find_blocks
import models.quantized_weight

folder, small_folder = sys.argv[1:]
blocks = BlockFormat("nf4", torch.device("cpu"))
options = blocks.diffusers_options(find_blocks)
SD3Transformer2DModel.from_pretrained(small_folder, dtype=torch.bfloat16, **options)  # imports what is needed
start, peak, is_over = anonymous_memory(), 0, threading.Event()

def watch():
    global peak
    while not is_over.wait(0.005):
        peak = max(peak, anonymous_memory())

thread = threading.Thread(target=watch)
thread.start()
model = SD3Transformer2DModel.from_pretrained(folder, dtype=torch.bfloat16, **options)
is_over.set()
thread.join()
parts = [part for weight in model.parameters() for part in models.quantized_weight.stored_parts(weight)]
print((peak - start) / 2**20, sum(part.nbytes for part in parts) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with Linux")
def test_loading_takes_the_memory_of_the_quantized_model(tmp_path):
    """Not that of the model in bf16, although its files are in fp32: 0.5 GB here."""
    from diffusers import SD3Transformer2DModel

    def model_of(num_heads: int) -> SD3Transformer2DModel:
        return SD3Transformer2DModel(
            num_layers=8, num_attention_heads=num_heads, attention_head_dim=64, joint_attention_dim=64,
            caption_projection_dim=64 * num_heads, pooled_projection_dim=64, sample_size=16, pos_embed_max_size=16,
        )  # fmt: skip

    torch.manual_seed(0)
    model = model_of(12)
    model.save_pretrained(tmp_path / "model")
    model_of(1).save_pretrained(tmp_path / "small")
    in_bf16 = 2 * sum(weight.numel() for weight in model.parameters()) / 2**20
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},  # freed tensors are returned
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak, quantized = map(float, result.stdout.split())
    assert quantized < 0.4 * in_bf16
    assert peak < quantized + 0.4 * in_bf16, (peak, quantized, in_bf16)
