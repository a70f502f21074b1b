"""A file in bf16, the default, carries the trained update, also if it is small next to the weight; and a file is
written and read with the model on any device."""

import json

import pytest
import torch
from helpers.adapter_cases import (
    ALL_SPECS,
    TAKEN_OUT,
    every_spec,
    model_of,
    randomized,
    scaled_update,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adapter_files import FORMATS, files
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings
from adapter_files.verification import verify_content
from adapter_files.writers import FileContent
from common.errors import AdapterError
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from lora_algos.detection import layer_delta

OTHER = torch.device(
    "cpu:1"
)  # fake tensors do not mix it with "cpu", as little as a GPU, and torch needs no CUDA
NAMES = LayerSpellings({"layer": "layer"})
every_writer = pytest.mark.parametrize("file_format", FORMATS)


def content_of(
    adapted: AdaptedModel, file_format: str, dtype: torch.dtype
) -> tuple[FileContent, dict[str, str]]:
    """The file and its metadata as a reader sees it. Skips what the format does not hold."""
    try:
        content = files.file_content(
            files.adapter_layers(adapted), adapted.model, NAMES, file_format, dtype
        )
    except AdapterError as error:
        pytest.skip(str(error).splitlines()[0])
    config = {} if content.config is None else {"adapter_config": json.dumps(content.config)}
    return content, {**content.metadata, **config}


def read_back(adapted: AdaptedModel, file_format: str, dtype: torch.dtype) -> Tensor:
    content, metadata = content_of(adapted, file_format, dtype)
    found, unknown = import_layers(content.tensors, metadata, adapted.model, NAMES)
    assert not unknown
    return layer_delta(found["layer"], files.base_weights(adapted.model)["layer"].detach())


@every_spec
@every_writer
@pytest.mark.parametrize("ratio", [1e-3, 1e-2])
@torch.no_grad()
def test_a_bf16_file_carries_a_small_update(spec, file_format, ratio):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(48, 48)})
    adapted = attach(model, {"layer": spec}, seed=0)
    scaled_update(adapted, ratio)
    delta = model["layer"].delta_weight()
    assert delta.norm() / model["layer"].base_layer.weight.norm() == pytest.approx(ratio, rel=0.05)
    assert (read_back(adapted, file_format, torch.bfloat16) - delta).norm() < 0.012 * delta.norm()
    exact = (
        2e-6 if spec.algorithm != "DoRA" and not spec.options.init.startswith(TAKEN_OUT) else 2e-4
    )
    assert (read_back(adapted, file_format, torch.float32) - delta).norm() < exact * delta.norm()


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
@torch.no_grad()
def test_what_was_taken_out_of_the_base_is_subtracted_to_the_last_digit(init):
    """Against fp64, where the two products are formed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(64, 96)})
    adapted = attach(
        model, {"layer": LayerSpec(8, 8.0, options=ALL_SPECS[f"LoRA {init}"].options)}, seed=0
    )
    scaled_update(adapted, 1e-3)
    model.double()
    exact = model["layer"].delta_weight()
    model.float()
    tensors = model["layer"].file_tensors()
    alpha = float(tensors.pop("alpha"))
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    rank = tensors["lora_down.weight"].shape[0]
    assert rank <= 16
    delta = (tensors["lora_up.weight"].double() @ tensors["lora_down.weight"].double()) * (
        alpha / rank
    )
    assert (delta - exact).norm() < 1e-6 * exact.norm()
    fresh = nn.ModuleDict({"layer": nn.Linear(64, 96)}).double()
    before = fresh["layer"].weight.clone()
    adapted.merge_into(fresh)
    assert (fresh["layer"].weight - before - exact).norm() < 1e-6 * exact.norm()


@every_writer
@torch.no_grad()
def test_magnitudes_are_fp32_in_every_file(file_format):
    model, _ = model_of("Conv2d")
    content, _ = content_of(
        attach(model, {"layer": LayerSpec(3, algorithm="DoRA")}, seed=0),
        file_format,
        torch.bfloat16,
    )
    wide = {key for key, tensor in content.tensors.items() if tensor.dtype == torch.float32}
    assert {key.rpartition(".")[2] for key in wide} - {"alpha"} <= {
        "dora_scale",
        "lora_magnitude_vector",
    }
    assert len([key for key in wide if not key.endswith("alpha")]) == 1


def to_other(model: nn.Module, mode: FakeTensorMode) -> None:
    """Puts fake tensors on another device in the place of the model's own."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, last = name.rpartition(".")
        module, fake = model.get_submodule(owner), mode.from_tensor(tensor.detach()).to(OTHER)
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(fake, requires_grad=False)
        else:
            module._buffers[last] = fake


@every_spec
@every_writer
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@torch.no_grad()
def test_a_file_is_made_and_read_with_the_model_on_another_device(
    spec, file_format, kind, monkeypatch
):
    monkeypatch.setattr(FakeTensor, "__float__", lambda tensor: 1.0, raising=False)
    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: True, raising=False)
    spec = LayerSpec(
        spec.rank,
        spec.alpha,
        spec.algorithm,
        spec.options,
        bias=file_format in ("kohya", "comfyui"),
    )
    there, plain, plain_there = (model_of(kind)[0] for _ in range(3))
    adapted = randomized(attach(there, {"layer": spec}, seed=0))
    content_of(adapted, file_format, torch.float32)  # skips what the format does not hold
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for model in (there, plain_there):
            to_other(model, mode)
        layers = files.adapter_layers(adapted)
        assert {t.device for tensors in layers.values() for t in tensors.values()} == {
            torch.device("cpu")
        }
        content = files.file_content(layers, there, NAMES, file_format, torch.bfloat16)
        assert {tensor.device for tensor in content.tensors.values()} == {torch.device("cpu")}
        verify_content(content, layers, there, NAMES)
        adapted.merge_into(plain)
        adapted.merge_into(plain_there)
