"""Single files of transformers that diffusers converts itself."""

import pytest
import torch
from helpers.family_cases import Case, cases, family_of, folder_of, native_tensors
from safetensors.torch import save_file

from models.config import ModelConfig
from models.detect import get_family
from tools.base_model import BaseModel

NAMES = (
    "sd3",
    "sd3.5-medium",
    "wan",
    "wan2.2-low",
    "wan2.2-5b",
    "wan2.1-i2v",
    "ernie_image",
    "hunyuan_video15",
)
CASES = pytest.mark.parametrize("case", [case for case in cases() if str(case) in NAMES], ids=str)


def test_all_are_there():
    assert {str(case) for case in cases()} >= {*NAMES}


def single_file(case: Case, prefix: str, path: str) -> ModelConfig:
    save_file(native_tensors(case, prefix), path)
    return ModelConfig(path=path, config=str(folder_of(case)), **case.model)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["plain", "ComfyUI"])
@CASES
def test_single_files_of_the_original_names_are_the_same_model(case, prefix, tmp_path):
    family = get_family(single_file(case, prefix, str(tmp_path / "model.safetensors")))
    assert family.name == case.family
    wanted, found = (of.load_denoiser(torch.float32) for of in (family_of(case), family))
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(
        tensor.equal(wanted.state_dict()[name]) for name, tensor in found.state_dict().items()
    )
    assert all(not buffer.is_meta for buffer in found.buffers())


@CASES
def test_the_tools_find_every_weight_of_a_single_file(case, tmp_path):
    model = BaseModel(
        single_file(case, "model.diffusion_model.", str(tmp_path / "model.safetensors"))
    )
    whole = family_of(case).load_denoiser(torch.float32)
    for layer in model.layers:
        assert model.weight(layer).equal(whole.get_submodule(layer).weight.data)
