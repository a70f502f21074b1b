"""Adapters under autocast and torch.compile, and what they keep for the backward pass."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.adapter_cases import (
    ALL_SPECS,
    SPECS,
    closed_form,
    every_algorithm,
    every_mode,
    every_spec,
    in_mode,
    model_of,
    randomized,
    spec_of,
    two_kinds,
)  # fmt: skip
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.adapters import prepared_tensors
from lora_algos.adapted_model import AdaptedModel
from lora_algos.adapter import AdapterLayer
from lora_algos.attach import attach
from lora_algos.config import LayerSpec


def grads_of(adapted: AdaptedModel, y: Tensor, x: Tensor) -> list[Tensor]:
    inputs = [x, *adapted.named_parameters().values()]
    return list(torch.autograd.grad(y.float().square().sum(), inputs))


@every_spec
@two_kinds
@every_mode
@pytest.mark.parametrize("base", ["fp32 base", "bf16 base"])
def test_under_bf16_autocast(spec, kind, mode, base):
    """Output in bf16, gradients in each tensor's own dtype, and all near what fp32 gives."""
    model, x = model_of(kind)
    adapted = randomized(attach(model, {"layer": in_mode(spec, mode)}, seed=0), size=0.2)
    layer = adapted.layers()["layer"]
    if base == "bf16 base":
        layer.base_layer.bfloat16()
    x.requires_grad_()
    weight = layer.base_layer.weight.float()
    bias = layer.base_layer.bias.float()
    tensors = {
        n.removeprefix("layer."): p for n, p in adapted.named_parameters().items()
    } | layer.constants()
    changed = {"weight": weight + closed_form(tensors, spec, weight), "bias": bias}
    expected = functional_call(layer.base_layer, changed, (x,))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    pairs = zip(grads_of(adapted, y, x), grads_of(adapted, expected, x), strict=True)
    for mine, other in pairs:
        assert mine.dtype == torch.float32
        # rotations and magnitudes see sums that cancel
        assert (mine - other).norm() < 0.05 * other.norm()


COMPILED = {**SPECS, "LoKr whole": ALL_SPECS["LoKr whole"]}


def compiled_matches(spec: LayerSpec, kind: str, backend: str) -> None:
    torch._dynamo.reset()
    model, x = model_of(kind)
    adapted = randomized(attach(model, {"layer": spec}, seed=0))
    x.requires_grad_()
    expected = model["layer"](x)
    compiled = torch.compile(model["layer"], fullgraph=True, backend=backend)
    y = compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for mine, other in zip(grads_of(adapted, y, x), grads_of(adapted, expected, x), strict=True):
        assert (mine - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("spec", COMPILED.values(), ids=COMPILED.keys())
@two_kinds
def test_compiles_without_a_graph_break(spec, kind):
    for mode in ("true", "false", "auto"):
        compiled_matches(in_mode(spec, mode), kind, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["LoRA", "OFT"])
def test_compiles_with_inductor(algorithm):
    compiled_matches(SPECS[algorithm], "Linear", "inductor")


def kept(run: Callable[[], Tensor], model: nn.Module) -> dict[int, int]:
    """Storage -> bytes of all that a forward pass keeps for the backward pass, but parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(run())
        for tensor in prepared_tensors(alive[-1]):
            pack(tensor)
    return found


@every_algorithm
@every_mode
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=["fp32 input", "bf16 input"])
def test_query_key_and_value_keep_their_input_once(spec, mode, given):
    if spec.algorithm in ("OFT", "BOFT") and mode != "false":
        pytest.skip("these keep their outputs")
    model = nn.ModuleDict({name: nn.Linear(48, 48) for name in ("to_q", "to_k", "to_v")})
    randomized(attach(model, dict.fromkeys(model, in_mode(spec, mode)), seed=0))
    x = torch.randn(2, 64, 48).to(given).requires_grad_()
    outputs: list[Tensor] = []

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs.extend(model[name](x) for name in model)
        return torch.stack(outputs)

    found = kept(run, model)
    size = x.numel() * 2
    outs = {y.untyped_storage().data_ptr() for y in outputs}
    inputs = [
        pointer for pointer, nbytes in found.items() if nbytes == size and pointer not in outs
    ]
    assert len(inputs) == 1
    assert (inputs[0] == x.untyped_storage().data_ptr()) == (given == torch.bfloat16)
    sum(y.float().square().sum() for y in outputs).backward()
    assert x.grad is not None
    assert x.grad.count_nonzero() > 0.9 * x.grad.numel()


SAVED = {
    **SPECS,
    "LoRA pissa": ALL_SPECS["LoRA pissa"],
    "LoKr low rank": spec_of("LoKr", rank=4, factor=8),
}
OF_OUTPUT = {"OFT": 0, "BOFT": 0, "DoRA": 1}  # how many inputs these keep besides their output


@pytest.mark.parametrize("spec", SAVED.values(), ids=SAVED.keys())
@pytest.mark.parametrize("grad", [False, True], ids=["input without grad", "input with grad"])
def test_little_more_than_the_input_is_kept(spec, grad):
    side, tokens = 640, 2048
    model = nn.ModuleDict({"layer": nn.Linear(side, side)}).bfloat16()
    spec = LayerSpec(2, spec.alpha, spec.algorithm, replace(spec.options, block_size=32))
    randomized(attach(model, {"layer": spec}, seed=0))
    x = torch.randn(tokens, side, dtype=torch.bfloat16).requires_grad_(grad)
    result: list[Tensor] = []

    def run() -> Tensor:
        result.append(model["layer"](x))
        return result[0]

    found = kept(run, model)
    given, output = x.untyped_storage().data_ptr(), result[0].untyped_storage().data_ptr()
    big = {pointer for pointer, nbytes in found.items() if nbytes >= x.nbytes}
    expected = {given}
    if spec.algorithm in OF_OUTPUT:
        expected = {output, given} if OF_OUTPUT[spec.algorithm] else {output}
    assert big == expected
    rest = sum(nbytes for pointer, nbytes in found.items() if pointer not in big)
    # the rest has the size of the adapter's own tensors (OFT: 0.0234) and does not grow with the tokens
    assert rest <= 0.024 * x.nbytes, rest / x.nbytes


def test_the_shared_copy_is_of_the_values_as_they_are():
    """A changed input, another dtype and another tensor get separate copies."""
    model, x = model_of("Linear")
    randomized(attach(model, {"layer": spec_of("LoRA")}, seed=0))
    layer: AdapterLayer = model["layer"]

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    first = run(x)
    assert run(x).equal(first)
    x.mul_(2)
    assert not run(x).equal(first)
    assert run(x.clone()).equal(run(x))
    needs = x.clone().requires_grad_()
    with torch.no_grad():
        run(needs)
    run(needs).float().sum().backward()
    assert needs.grad is not None
    assert needs.grad.count_nonzero() > 0
