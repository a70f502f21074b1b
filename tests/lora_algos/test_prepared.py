"""A training prepares an adapter's factors once per step, and again after every change of them."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.adapter_cases import ALL_SPECS, model_of, randomized
from helpers.kernel_count import KernelCount
from torch import Tensor, nn

from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach
from lora_algos.prepared import PreparedFactors, parameter_updates
from training.optim.arguments import optimizer_class
from training.optim.registry import OPTIMIZERS

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
def kept_values(monkeypatch):
    """The values that layers kept, in order."""
    values = []
    original = PreparedFactors.put

    def recorded(self, factors, layer_values, dtype):
        values.append(layer_values)
        original(self, factors, layer_values, dtype)

    monkeypatch.setattr(PreparedFactors, "put", recorded)
    return values


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "OFT"])
def test_factors_are_prepared_once_per_step(name, kept_values):
    adapted, x = adapted_in_bf16(name)
    for _ in range(2):
        for _ in range(3):  # micro-batches
            adapted.model.layer(x).sum().backward()
        CHANGES["AdamW"](adapted)
    assert len(kept_values) == 2


def test_layers_are_asked_for_their_factors_once(monkeypatch):
    """Not in each step, because 500 layers take a while to ask."""
    adapted, x = adapted_in_bf16("LoRA")
    calls = []
    factors = type(adapted.model.layer).parameter_factors

    def counted(layer):
        calls.append(layer)
        return factors(layer)

    monkeypatch.setattr(type(adapted.model.layer), "parameter_factors", counted)
    for _ in range(3):
        adapted.model.layer(x).sum().backward()
        CHANGES["AdamW"](adapted)
    assert len(calls) == 1
    adapted.model.to("cpu")
    CHANGES["AdamW"](adapted)
    adapted.model.layer(x)
    assert len(calls) == 2


def test_a_move_prepares_factors_again(kept_values):
    adapted, x = adapted_in_bf16("OFT")
    for _ in range(2):
        adapted.model.layer(x)
        adapted.model.to("cpu")
    assert len(kept_values) == 2


def test_all_layers_are_converted_together(kept_values):
    """In one copy, also with a scaling, and with layers that prepare their own."""
    base, x = model_of(KIND, torch.bfloat16)
    names = ["LoRA", "GLoRA", "LoKr", "LoHa", "OFT", "LoRA pissa"]
    model = nn.ModuleDict({name.replace(" ", "_"): copy.deepcopy(base.layer) for name in names})
    specs = {name.replace(" ", "_"): ALL_SPECS[name] for name in names}
    adapted = randomized(attach(model, specs, 0))
    adapted.prepare_once_per_step()
    with KernelCount() as kernels:
        model.LoRA(x.bfloat16())
    assert len(kept_values) == 4
    assert kernels.counts["aten._foreach_copy_"] == 1
    for name in names:
        layer = model[name.replace(" ", "_")]
        y = layer(x.bfloat16())
        layer.prepared.group = None
        assert torch.equal(y, layer(x.bfloat16()))


def test_by_default_nothing_group():
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizers_step_is_counted(name):
    """So the engines need not say that parameters have changed."""
    entry = OPTIMIZERS[name]
    pytest.importorskip(entry.module)
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = optimizer_class(name)([parameter], lr=0.1, **entry.fixed_args)
    if entry.is_schedule_free:
        optimizer.train()
    parameter.grad = torch.ones(2, 2)
    count = parameter_updates.count
    optimizer.step()
    assert parameter_updates.count > count
