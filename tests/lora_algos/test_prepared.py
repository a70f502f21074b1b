"""A training prepares an adapter's factors once per step, and again after every change of them."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.adapter_cases import ALL_SPECS, model_of, randomized
from torch import Tensor

from lora_algos import prepared
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach
from lora_algos.prepared import parameter_updates

KIND = "Linear"


def adapted_in_bf16(name: str) -> tuple[AdaptedModel, Tensor]:
    """A layer whose passes compute in another dtype than its factors have."""
    model, x = model_of(KIND, torch.bfloat16)
    adapted = randomized(attach(model, {"layer": ALL_SPECS[name]}, 0))
    adapted.prepare_once_per_step()
    return adapted, x.bfloat16()


def output_of_copy(adapted: AdaptedModel, x: Tensor) -> Tensor:
    """The output of a copy that has prepared nothing yet."""
    fresh = copy.deepcopy(adapted.model)
    fresh.layer.prepared.clear()
    return fresh.layer(x)


def step_with(make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable:
    def change(adapted: AdaptedModel) -> None:
        parameters = list(adapted.named_parameters().values())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        make_optimizer(parameters).step()

    return change


class DataOptimizer(torch.optim.Optimizer):
    """Writes parameters as some optimizers outside torch do, which their versions do not show."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__(parameters, {})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad.data)


def load_other_values(adapted: AdaptedModel) -> None:
    state = {name: torch.randn_like(tensor) for name, tensor in adapted.state_dict().items()}
    adapted.load_state_dict(state)


@torch.no_grad()
def copy_ema(adapted: AdaptedModel) -> None:
    parameters = list(adapted.named_parameters().values())
    torch._foreach_copy_(parameters, [torch.randn_like(parameter) for parameter in parameters])


def replace_parameters(adapted: AdaptedModel) -> None:
    state = {name: torch.randn_like(value) for name, value in adapted.model.state_dict().items()}
    adapted.model.load_state_dict(state, assign=True)


def write_data(adapted: AdaptedModel) -> None:
    for parameter in adapted.named_parameters().values():
        parameter.data.copy_(torch.randn_like(parameter))
    parameter_updates.add()


CHANGES: dict[str, Callable[[AdaptedModel], None]] = {
    "AdamW": step_with(lambda parameters: torch.optim.AdamW(parameters, lr=0.5)),
    "SGD of one tensor at a time": step_with(
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, foreach=False)
    ),
    "optimizer that writes data": step_with(DataOptimizer),
    "load_state_dict": load_other_values,
    "EMA": copy_ema,
    "other parameters": replace_parameters,
    "data": write_data,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ALL_SPECS)
def test_a_change_is_seen(name, change):
    adapted, x = adapted_in_bf16(name)
    before = adapted.model.layer(x)
    CHANGES[change](adapted)
    after = adapted.model.layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, output_of_copy(adapted, x))


@pytest.fixture
def prepared_kernels(monkeypatch):
    """Class names of the kernels that prepared factors, in order."""
    kernels = []
    original = prepared.prepare

    def recorded(kernel, *arguments):
        kernels.append(type(kernel).__name__)
        return original(kernel, *arguments)

    monkeypatch.setattr(prepared, "prepare", recorded)
    return kernels


def test_factors_are_prepared_once_per_step(prepared_kernels):
    adapted, x = adapted_in_bf16("OFT")
    for _ in range(2):
        for _ in range(3):  # micro-batches
            adapted.model.layer(x).sum().backward()
        CHANGES["AdamW"](adapted)
    assert prepared_kernels == ["BlockRotation"] * 2


def test_a_move_prepares_factors_again(prepared_kernels):
    adapted, x = adapted_in_bf16("LoRA")
    for _ in range(2):
        adapted.model.layer(x)
        adapted.model.to("cpu")
    assert len(prepared_kernels) == 2


def test_by_default_nothing_is_reused():
    """So users of the library may write parameters as they like."""
    model, x = model_of(KIND, torch.bfloat16)
    adapted = randomized(attach(model, {"layer": ALL_SPECS["LoRA"]}, 0))
    x = x.bfloat16()
    before = model.layer(x)
    for parameter in adapted.named_parameters().values():
        parameter.data.copy_(torch.randn_like(parameter))
    assert not torch.equal(model.layer(x), before)


def test_inference_mode_leaves_nothing_behind():
    adapted, x = adapted_in_bf16("DoRA")
    with torch.inference_mode():
        adapted.model.layer(x)
    adapted.model.layer(x).sum().backward()
    assert all(isinstance(p.grad, Tensor) for p in adapted.named_parameters().values())
