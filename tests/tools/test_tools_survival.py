"""`inspect --against`: what is left of an adapter in the format of another program's file."""

from pathlib import Path

import pytest
import torch
from helpers.family_cases import cases, folder_of, native_tensors
from helpers.quantized_files import write_gguf, write_scaled
from safetensors.torch import save_file
from torch import Tensor

import train_lora

FLUX = next(case for case in cases() if str(case) == "flux1-dev")
LAYER = "transformer_blocks.0.attn.to_k"
ROWS = slice(16, 32)
"""The rows of this layer in the fused weight of the file."""
FUSED = "double_blocks.0.img_attn.qkv.weight"


def write_lora(path: Path, scale: float, layer: str = LAYER, width: int = 16) -> Tensor:
    """Writes a LoRA on one layer; returns its update."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(16, 4, generator=generator), torch.randn(4, width, generator=generator)
    up *= scale
    tensors = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    save_file(tensors, path)
    return up @ down


def stays(path: Path, lora: Path, capsys) -> tuple[str, str]:
    """Prints the table; returns its last two cells."""
    options = ["--against", str(path), "--config", str(folder_of(FLUX))]
    assert train_lora.main(["inspect", str(lora), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"merged into {path}") for line in lines)
    *_, share, noise = lines[-1].split()
    return share, noise


def expected(weight: Tensor, update: Tensor, merged: Tensor) -> tuple[str, str]:
    remainder = merged - weight
    share = (update * remainder).sum() / update.square().sum()
    noise = (remainder - update).norm() / update.norm()
    return f"{share:.1%}", f"{noise:.1%}"


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_plain_file_rounds_to_its_dtype(dtype, scale, tmp_path, capsys):
    path, lora = tmp_path / "model.safetensors", tmp_path / "lora.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in native_tensors(FLUX).items()}
    save_file(tensors, path)
    update = write_lora(lora, scale)
    weight = tensors[FUSED][ROWS].float()
    merged = (weight + update).to(dtype).float()
    assert stays(path, lora, capsys) == expected(weight, update, merged)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_scaled_file_rounds_with_its_scales(dtype, tmp_path, capsys):
    path, lora = tmp_path / "model.safetensors", tmp_path / "lora.safetensors"
    tensors = native_tensors(FLUX)
    values = write_scaled(path, tensors, ".weight_scale", dtype)
    update = write_lora(lora, 1e-3)
    weight = values[FUSED][ROWS]
    share, noise = stays(path, lora, capsys)
    assert 0 < float(share.rstrip("%")) < 200
    assert float(noise.rstrip("%")) > 20, "steps of 8 bits are larger than this update"
    assert weight.shape == update.shape


def test_updates_of_gguf_files_are_merged_into_values(tmp_path, capsys):
    path, lora = tmp_path / "model.gguf", tmp_path / "lora.safetensors"
    values = write_gguf(path, native_tensors(FLUX), "Q8_0")
    update = write_lora(lora, 1e-2, "transformer_blocks.0.ff.net.2", 64)
    weight = values["double_blocks.0.img_mlp.2.weight"]
    merged = (weight + update).bfloat16().float()
    assert stays(path, lora, capsys) == expected(weight, update, merged)


def test_a_model_that_does_not_exist_is_an_error(tmp_path, capsys):
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, 1e-2)
    assert train_lora.main(["inspect", str(lora), "--against", "nowhere.safetensors"]) == 2
    assert "--against nowhere.safetensors: does not exist" in capsys.readouterr().err
