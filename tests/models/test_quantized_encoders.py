"""Text encoders with quantized weights: those of files that are quantized, and those that are quantized while they
are loaded. They encode as dense encoders with the same values."""

import re
from pathlib import Path

import gguf
import pytest
import torch
from helpers.family_cases import Case, cases, folder_of
from helpers.quantized_files import write_gguf, write_scaled
from helpers.text_files import assert_same_rows, bare, comfy_tensors, encoders_of
from safetensors.torch import save_file
from torch import Tensor, nn

from models.base import ModelFamily
from models.config import ModelConfig
from models.detect import get_family
from models.empty_components import empty_encoders
from models.encoder_placement import text_encoders_of
from models.gguf_file import gguf_shapes
from models.quantized_encoders import quantize_encoder
from models.quantized_weight import QuantizedWeight, stored_parts
from training.memory.fake_tensors import fake_tensors

CASES = {str(case): case for case in cases()}
NAMES = ["flux1-dev", "qwen_image", "z_image", "flux2", "flux2_klein", "wan"]
"""Models with T5, UMT5 and three language models."""
EVERY_CASE = pytest.mark.parametrize("name", [name for name in CASES if name in NAMES])
ARCHITECTURES = {
    "flux1-dev": gguf.MODEL_ARCH.T5ENCODER,
    "qwen_image": gguf.MODEL_ARCH.QWEN2VL,
    "z_image": gguf.MODEL_ARCH.QWEN3,
}


def test_all_cases_exist():
    assert {*NAMES} <= CASES.keys()


def num_quantized(encoder: nn.Module) -> int:
    return sum(isinstance(weight.data, QuantizedWeight) for weight in encoder.parameters())


def family_with(case: Case, files: list[Path], folder: Path) -> ModelFamily:
    config = ModelConfig(path=str(folder), text_encoders=tuple(map(str, files)), **case.model)
    return get_family(config)


def write_files(case: Case, folder: Path, is_scaled: bool) -> tuple[list[Path], list[Path]]:
    """Scaled files of all encoders, or GGUF files of the large ones; and plain files of the same values."""
    paths, plain_paths = [], []
    for name, encoder in encoders_of(case).items():
        tensors = comfy_tensors(encoder)
        path, plain_path = folder / f"{name}.safetensors", folder / f"plain_{name}.safetensors"
        values = tensors
        if is_scaled:
            values = write_scaled(path, tensors)
        elif type(encoder).__name__.startswith("CLIP"):
            save_file(tensors, path)
        else:
            path = folder / f"{name}.gguf"
            values = gguf_values(path, case, tensors)
        save_file({key: value.contiguous() for key, value in values.items()}, plain_path)
        paths.append(path)
        plain_paths.append(plain_path)
    return paths, plain_paths


def gguf_values(path: Path, case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Writes an encoder under the names that the gguf package gives its tensors; returns the values by their own."""
    architecture = ARCHITECTURES[str(case)]
    names = gguf.get_tensor_name_map(architecture, 9)
    keys = {}
    for name in tensors:
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is not None:
            keys[new_name] = name
    renamed = {new_name: tensors[name] for new_name, name in keys.items()}
    values = write_gguf(path, renamed, "Q8_0", gguf.MODEL_ARCH_NAMES[architecture])
    return {keys[new_name]: value for new_name, value in values.items()}


def check_files(case: Case, folder: Path, is_scaled: bool) -> list[int]:
    """Quantized files encode as plain ones of their values; returns the numbers of quantized weights."""
    model = bare(case, folder / "bare", "text_encoder*")
    paths, plain_paths = write_files(case, folder, is_scaled)
    family = family_with(case, paths, model)
    assert_same_rows(family, family_with(case, plain_paths, model))
    return [num_quantized(encoder) for encoder in text_encoders_of(family.load_encoders("text"))]


@EVERY_CASE
def test_scaled_files_encode_as_their_values(name, tmp_path):
    assert all(check_files(CASES[name], tmp_path, is_scaled=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf_files_encode_as_their_values(name, tmp_path):
    assert any(check_files(CASES[name], tmp_path, is_scaled=False))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_llama_cpp_has_transformers_name(name, tmp_path):
    case = CASES[name]
    paths, _ = write_files(case, tmp_path, is_scaled=False)
    for path in paths:
        if path.suffix == ".gguf":
            unknown = [key for key in gguf_shapes(path) if re.match(r"(enc\.)?blk|token_embd", key)]
            assert not unknown


def quantized_family(case: Case, quantization: str) -> ModelFamily:
    config = ModelConfig(
        path=str(folder_of(case)), text_encoder_quantization=quantization, **case.model
    )
    return get_family(config)


@pytest.mark.parametrize(
    "quantization",
    [
        "nf4",
        pytest.param("int8", marks=pytest.mark.long),
        pytest.param("fp8", marks=pytest.mark.long),
    ],
)
@EVERY_CASE
def test_large_encoders_are_quantized_while_they_are_loaded(name, quantization, monkeypatch):
    monkeypatch.setattr("models.model_files.MIN_LARGE", 1000)
    case = CASES[name]
    plain, family = quantized_family(case, "none"), quantized_family(case, quantization)
    assert family.text_cache_tag != plain.text_cache_tag, "other conditioning is cached apart"
    expected = plain.load_encoders("text")
    for encoder in text_encoders_of(expected):
        quantize_encoder(encoder, quantization)
        assert num_quantized(encoder)
    loaded = family.load_encoders("text")
    with torch.no_grad():
        rows = family.encode_prompt(loaded, ["a cat"])[0]
        expected_rows = family.encode_prompt(expected, ["a cat"])[0]
    assert all(rows[key].equal(expected_rows[key]) for key in expected_rows)
    for encoder in text_encoders_of(loaded):
        assert not hasattr(encoder.config, "quantization_config")


def test_small_encoders_stay_plain():
    family = quantized_family(CASES["flux1-dev"], "nf4")
    assert not any(map(num_quantized, text_encoders_of(family.load_encoders("text"))))
    assert family.text_cache_tag == quantized_family(CASES["flux1-dev"], "none").text_cache_tag


def weight_bytes(encoder: nn.Module) -> int:
    return sum(part.nbytes for weight in encoder.parameters() for part in stored_parts(weight.data))


@EVERY_CASE
def test_the_plan_knows_the_formats_of_files(name, tmp_path):
    case = CASES[name]
    folder = bare(case, tmp_path / "bare", "text_encoder*")
    paths, _ = write_files(case, tmp_path, is_scaled=name not in ARCHITECTURES)
    family = family_with(case, paths, folder)
    loaded = [weight_bytes(encoder) for encoder in text_encoders_of(family.load_encoders("text"))]
    with fake_tensors(is_gpu=False):
        planned = [weight_bytes(part) for part in text_encoders_of(empty_encoders(family, "text"))]
    assert planned == loaded
