"""Files whose weights are quantized already: GGUF, and codes with scales. Their values are those that the packages
which made them compute."""

import builtins
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from helpers.family_cases import Case, cases, family_of, folder_of, native_tensors
from helpers.ldm import save_single_file
from helpers.project import BASE
from helpers.quantized_files import ROW, write_gguf, write_scaled
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ModelError
from models.base import ModelFamily
from models.block_format import BlockFormat
from models.config import ModelConfig
from models.detect import get_family
from models.families.transformer_family import TransformerFamily
from models.gguf_formats import BLOCK_TYPES, BLOCKS
from models.quantization import CODES, quantizable_layers
from models.quantized_weight import QuantizedWeight, plain_values
from tools.base_model import BaseModel

STORED = BlockFormat("none", keeps_stored_format=True)
CASES = [
    case
    for case in cases()
    if isinstance(family_of(case), TransformerFamily) and str(case) != "sd3-without-t5"
]
"""Each denoiser once."""
FLUX = next(case for case in cases() if str(case) == "flux1-dev")
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
MOST_LONG = pytest.mark.parametrize(
    "case",
    [FLUX, *[pytest.param(case, marks=pytest.mark.long) for case in CASES if case is not FLUX]],
    ids=str,
)
FACTORS = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Type -> first bytes of the half floats in a block; (0,) for the others. All other bits are codes."""


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_block_type_has_the_values_of_the_gguf_package(name):
    block_type, kind = BLOCK_TYPES[name], Type[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (block_type.num_values, block_type.num_bytes)
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (64, block_type.num_bytes), dtype=np.uint8)
    for first in FACTORS.get(name, (0,)):
        data[:, first : first + 2] = random.normal(size=(64, 1)).astype(np.float16).view(np.uint8)
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    stored = {BLOCKS: torch.from_numpy(data)}
    assert block_type.values(stored, expected.shape, torch.float32).equal(expected)
    rounded = block_type.values(stored, expected.shape, torch.bfloat16)
    assert rounded.equal(expected.bfloat16()), "rounded once"


def family_of_file(case: Case, path: Path) -> ModelFamily:
    return get_family(ModelConfig(path=str(path), config=str(folder_of(case)), **case.model))


def check_weights(case: Case, path: Path, values: dict[str, Tensor], tmp_path: Path) -> None:
    """The file is the model that has its values as plain weights. Only layers of blocks stay quantized."""
    plain = tmp_path / "plain.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in values.items()}, plain)
    expected = family_of_file(case, plain).load_denoiser(torch.float32)
    family = family_of_file(case, path)
    assert family.name == case.family
    assert family.block_storage == "the file's format"
    loaded = family.load_denoiser(torch.float32, STORED)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    quantized = set()
    for name, weight in loaded.named_parameters():
        assert plain_values(weight.data).equal(expected.get_parameter(name)), name
        if isinstance(weight.data, QuantizedWeight):
            quantized.add(name.removesuffix(".weight"))
    candidates = quantizable_layers(family.blocks(expected))
    is_gguf = path.suffix == ".gguf"
    divisible = {
        name for name, layer in candidates.items() if not is_gguf or layer.in_features % ROW == 0
    }
    assert quantized == divisible
    assert quantized
    dense = family.load_denoiser(torch.bfloat16)
    assert not any(isinstance(weight.data, QuantizedWeight) for weight in dense.parameters())


@EVERY_CASE
def test_every_transformer_is_read_from_gguf(case, tmp_path):
    path = tmp_path / "model.gguf"
    check_weights(case, path, write_gguf(path, native_tensors(case), "Q8_0"), tmp_path)


@MOST_LONG
def test_every_transformer_is_read_from_scaled_fp8(case, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = native_tensors(case, "model.diffusion_model.")
    check_weights(case, path, write_scaled(path, tensors), tmp_path)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_other_types_are_read(quantization, tmp_path):
    path = tmp_path / "model.gguf"
    check_weights(FLUX, path, write_gguf(path, native_tensors(FLUX), quantization), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_newer_names_of_scales_are_read(dtype, tmp_path):
    path = tmp_path / "model.safetensors"
    values = write_scaled(path, native_tensors(FLUX), ".weight_scale", dtype)
    check_weights(FLUX, path, values, tmp_path)


def test_a_shape_that_the_converter_changed_is_restored(tmp_path):
    """ComfyUI-GGUF's converter stores some weights with another shape, and notes their own."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    values = torch.randn(6, 4, 2)
    writer.add_array("comfy.gguf.orig_shape.x.weight", list(values.shape))
    writer.add_tensor("x.weight", values.numpy().reshape(12, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from models.gguf_file import GgufFile, gguf_shapes

    assert gguf_shapes(path) == {"x.weight": (6, 4, 2)}
    with GgufFile(path) as file:
        assert file.read("x.weight", torch.float32).equal(values)


def test_another_format_replaces_that_of_the_file(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, native_tensors(FLUX), "Q8_0")
    family = family_of_file(FLUX, path)
    dense = family.load_denoiser(torch.bfloat16)
    loaded = family.load_denoiser(torch.bfloat16, BlockFormat("nf4", keeps_stored_format=True))
    expected = BlockFormat("nf4")
    layers = quantizable_layers(family.blocks(dense))
    for name, layer in layers.items():
        weight: Any = loaded.get_submodule(name).weight.data
        assert weight.format.name == "nf4"
        assert weight.values().equal(expected.quantized(layer.weight).values())


@pytest.mark.parametrize("write", ["plain", "scaled"])
def test_fp8_keeps_the_codes_of_an_fp8_file(write, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = native_tensors(FLUX)
    if write == "scaled":
        write_scaled(path, tensors)
    else:
        save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, path)
    family = family_of_file(FLUX, path)
    dense = family.load_denoiser(torch.bfloat16)
    loaded = family.load_denoiser(torch.bfloat16, BlockFormat("fp8", keeps_stored_format=True))
    for name, layer in quantizable_layers(family.blocks(dense)).items():
        weight: Any = loaded.get_submodule(name).weight.data
        assert weight.stored[CODES].dtype == torch.float8_e4m3fn
        assert weight.values().equal(layer.weight), "no value is rounded again"


@pytest.mark.parametrize("kind", ["gguf", "fp8"])
@MOST_LONG
def test_the_tools_read_the_values(case, kind, tmp_path):
    path = tmp_path / ("model.gguf" if kind == "gguf" else "model.safetensors")
    if kind == "gguf":
        write_gguf(path, native_tensors(case), "Q8_0")
    else:
        write_scaled(path, native_tensors(case))
    model = BaseModel(ModelConfig(path=str(path), config=str(folder_of(case)), **case.model))
    whole = family_of_file(case, path).load_denoiser(torch.float32)
    for layer in model.layers:
        assert model.weight(layer).equal(whole.get_submodule(layer).weight.data)


def test_nothing_is_merged_into_quantized_weights(tmp_path, capsys):
    import train_lora

    path, lora = tmp_path / "model.gguf", tmp_path / "lora.safetensors"
    write_gguf(path, native_tensors(FLUX), "Q8_0")
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1, 1)}, lora)
    out = tmp_path / "out.safetensors"
    options = [str(path), str(out), "--lora", str(lora), "--config", str(folder_of(FLUX))]
    assert train_lora.main(["merge", *options]) == 2
    message = capsys.readouterr().err
    assert f"MODEL {path}: has quantized weights, into which nothing can be merged" in message
    assert not out.exists()


def error_of(path: Path, case: Case = FLUX) -> str:
    with pytest.raises(ModelError) as caught:
        family_of_file(case, path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"format": "nvfp4"}, "nvfp4"), ({"format": "int8_tensorwise", "convrot": True}, "int8_tensorwise with convrot")],
)  # fmt: skip
@pytest.mark.parametrize("place", ["tensor", "header"])
def test_formats_that_are_not_read_are_named(options, name, place, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors, header = native_tensors(FLUX), {}
    if place == "tensor":
        text = json.dumps(options).encode()
        tensors["double_blocks.0.img_attn.qkv.comfy_quant"] = torch.tensor(
            list(text), dtype=torch.uint8
        )
    else:
        header["_quantization_metadata"] = json.dumps({"layers": {"x": options}})
    save_file(tensors, path, header)
    message = error_of(path)
    assert f"--model.path {path}: has weights in {name}; expected plain weights" in message


def test_files_of_bitsandbytes_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    extra = {"x.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}
    save_file(native_tensors(FLUX) | extra, path)
    assert "has weights in a format of bitsandbytes" in error_of(path)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale_2", "scales"])
def test_scales_of_unknown_kinds_are_named(name, tmp_path):
    """Codes without the scales that they need would be other weights."""
    path = tmp_path / "model.safetensors"
    layer = "double_blocks.0.img_mlp.0"
    tensors = native_tensors(FLUX)
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors | {f"{layer}.{name}": torch.ones(1)}, path)
    assert f"has weights in codes with {name}" in error_of(path)


def test_codes_of_convolutions_are_scaled(tmp_path):
    case = next(case for case in CASES if case.family == "sd3")
    path = tmp_path / "model.safetensors"
    tensors = native_tensors(case)
    key = "x_embedder.proj.weight"
    weight = tensors[key]
    tensors[key] = (weight / weight.abs().max() * 448).to(torch.float8_e4m3fn)
    tensors["x_embedder.proj.scale_weight"] = weight.abs().max() / 448
    save_file(tensors, path)
    loaded = family_of_file(case, path).load_denoiser(torch.float32).pos_embed.proj.weight
    assert torch.allclose(loaded, weight, rtol=0.07, atol=1e-3)


def test_an_encoder_with_scales_in_a_checkpoint_is_refused(tmp_path):
    """diffusers' converter would read its codes without them."""
    path = tmp_path / "model.safetensors"
    prefix = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    encoder = {f"{prefix}.weight": codes, f"{prefix}.scale_weight": torch.ones(1)}
    save_file(native_tensors(FLUX, "model.diffusion_model.") | encoder, path)
    family = family_of_file(FLUX, path)
    with pytest.raises(ModelError, match=r"contains text_encoder_2 with scaled weights"):
        family.load_encoders("text")


def test_a_gguf_file_without_codes_is_a_plain_one(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    for name, tensor in native_tensors(FLUX).items():
        writer.add_tensor(name, tensor.to(torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    family = family_of_file(FLUX, path)
    assert family.block_storage is None
    assert family.files.denoiser_dtype() == torch.bfloat16
    model = BaseModel(ModelConfig(path=str(path), config=str(folder_of(FLUX))))
    assert model.stored_weight("x_embedder").dtype == torch.float16
    loaded = family.load_denoiser(torch.float32, STORED)
    assert not any(isinstance(weight.data, QuantizedWeight) for weight in loaded.parameters())


def test_types_that_are_not_read_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    size = gguf.GGML_QUANT_SIZES[Type.IQ4_XS][1]
    writer.add_tensor("img_in.weight", np.zeros((4, size), np.uint8), raw_dtype=Type.IQ4_XS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = error_of(path)
    assert "IQ4_XS, for example img_in.weight" in message
    assert "Q4_K" in message


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    original = builtins.__import__

    def without_gguf(name: str, *args: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    assert "need the package gguf. Install it with: pip install gguf" in error_of(path)


@pytest.mark.parametrize("cut", [0, 3, 20, 100, 1000, -1000])
def test_a_broken_gguf_file_is_refused(cut, tmp_path):
    whole, path = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    write_gguf(whole, native_tensors(FLUX), "Q8_0")
    path.write_bytes(whole.read_bytes()[:cut])
    reason = "is not a GGUF file" if cut in (0, 3) else "is incomplete or damaged"
    message = error_of(path)
    assert f"--model.path {path}: {reason}" in message


def test_the_configuration_of_another_family_is_an_error(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, native_tensors(FLUX), "Q8_0")
    other = next(case for case in CASES if case.family == "z_image")
    with pytest.raises(ModelError) as caught:
        get_family(ModelConfig(path=str(path), config=str(folder_of(other))))
    message = str(caught.value)
    assert f"--model.config {folder_of(other)}: is the configuration of a ZImagePipeline" in message
    assert f"{path} is flux1" in message


@pytest.mark.parametrize("key", ["out.2.scale_weight", "out.2.weight_scale"])
def test_unets_are_refused(key, tmp_path):
    path = tmp_path / "unet.safetensors"
    save_single_file(BASE, path, torch.float32)
    tensors = load_file(path)
    save_file(tensors | {f"model.diffusion_model.{key}": torch.ones(1)}, path)
    with pytest.raises(
        ModelError, match="is a GGUF or quantized file, which cannot be read for sd15"
    ):
        get_family(ModelConfig(path=str(path), config=str(BASE)))
