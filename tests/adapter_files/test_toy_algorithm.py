"""An algorithm is one file and one line: one that the tests define and register is trained, written, read, cut, fused,
converted and merged by a program that does not know it."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from helpers.project import PROJECT
from helpers.toy_algorithm import GAIN, U, V
from torch import Tensor, nn

from adapter_files import FORMATS, convert, files
from adapter_files.kohya_metadata import network_metadata
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings
from adapter_files.verification import MAX_ERROR, verify_content
from adapter_files.writers import FileContent
from common.errors import AdapterError
from lora_algos import ALGORITHMS
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach, attach_from_file
from lora_algos.config import AdapterConfig, AdapterOptions, LayerSpec
from lora_algos.detection import (
    algorithm_name,
    all_algorithms,
    guess_weight_shape,
    layer_delta,
    rank_of,
)
from lora_algos.plan import AdapterPlan

TOYS = {"GatedToy": "helpers.toy_algorithm", "PlainToy": "helpers.toy_plain"}
FUSED = {"to_q": (0, 12), "to_k": (12, 12), "to_v": (24, 12)}
LAYERS = (*FUSED, "swapped", "linear", "conv")
NAMES = LayerSpellings(
    original={**dict.fromkeys(FUSED, "qkv"), "swapped": "final.1", "linear": "in", "conv": "c"},
    kohya_uses_original=True,
    slices=FUSED,
    swapped=frozenset({"swapped"}),
)
every_toy = pytest.mark.parametrize("algorithm", TOYS)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, module in TOYS.items():
        monkeypatch.setitem(ALGORITHMS, name, module)


class Model(nn.Module):
    """Layers of every shape; three of them are one weight in the original model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 12) for _ in range(3))
        self.swapped = nn.Linear(36, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.conv(x).movedim(1, -1)).tanh()
        return self.swapped(torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], -1))


def base() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model()


INPUT = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(4, 6, 6, 16, generator=torch.Generator().manual_seed(2))


@torch.enable_grad()
def trained(
    algorithm: str, layers: tuple[str, ...] = LAYERS, steps: int = 4, **options: float
) -> AdaptedModel:
    """Adapters of different ranks and alphas after a few steps by hand."""
    specs = {
        name: LayerSpec(1 + i % 3, 0.5 + i, algorithm, AdapterOptions(**options), bias=True)
        for i, name in enumerate(layers)
    }
    adapted = attach(base(), specs, seed=0)
    parameters = list(adapted.named_parameters().values())
    losses = []
    for _ in range(steps):
        loss = (adapted.model(INPUT) - TARGET).square().mean()
        grads = torch.autograd.grad(loss, parameters)
        losses.append(float(loss))
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter -= 0.02 * grad
    assert losses == sorted(losses, reverse=True)
    return adapted


def contents(adapted: AdaptedModel, file_format: str) -> FileContent:
    layers = files.adapter_layers(adapted)
    content = files.file_content(layers, adapted.model, NAMES, file_format, torch.float32)
    assert verify_content(content, layers, adapted.model, NAMES) <= MAX_ERROR
    return content


def read(content: FileContent) -> AdaptedModel:
    model = base()
    layers, errors = import_layers(content.tensors, content.metadata, model, NAMES)
    return attach_from_file(model, layers, errors)


@every_toy
@pytest.mark.parametrize("mode", ["true", "false", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_computes_its_formula(algorithm, mode, dtype):
    adapted = trained(algorithm)
    layer = adapted.layers()["to_q"]
    layer.spec = LayerSpec(**{**vars(layer.spec), "bypass_mode": mode})
    layer.base_layer.to(dtype)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight = layer.base_layer.weight.float() + layer.delta_weight()
    expected = nn.functional.linear(x.float(), weight, layer.base_layer.bias.float() + layer.diff_b)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(layer(x).float(), expected, rtol=tolerance, atol=tolerance)
    parameters = list(layer.update_tensors().values())
    grads = torch.autograd.grad(layer(x).float().sin().sum(), parameters)
    expected_grads = torch.autograd.grad(expected.sin().sum(), parameters)
    for actual, grad in zip(grads, expected_grads, strict=True):
        assert (actual - grad).norm() <= 10 * tolerance * grad.norm()


@every_toy
@pytest.mark.parametrize("file_format", ["kohya", "comfyui"])
@torch.no_grad()
def test_a_file_holds_what_was_trained(algorithm, file_format):
    adapted = trained(algorithm)
    again = read(contents(adapted, file_format))
    expected, plain = adapted.model(INPUT), base()(INPUT)
    assert (expected - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(again.model(INPUT), expected, rtol=0, atol=1e-5)
    names = {name: spec.algorithm for name, spec in again.specs().items()}
    kept = LAYERS if algorithm == "GatedToy" else ("linear", "conv")
    assert {name for name, found in names.items() if found == algorithm} == {*kept}
    assert {names[name] for name in LAYERS if name not in kept} <= {"Full"}


@every_toy
@pytest.mark.parametrize(
    "file_format", [name for name in FORMATS if name not in ("kohya", "comfyui")]
)
def test_formats_that_cannot_hold_it_name_the_layers(algorithm, file_format):
    with pytest.raises(AdapterError, match=rf"only holds (.|\n)*conv: {algorithm}"):
        contents(trained(algorithm), file_format)


def test_fused_rows_keep_the_algorithm_and_each_layer_its_own_rank():
    content = contents(trained("GatedToy"), "kohya")
    fused = {
        key.removeprefix("lora_unet_qkv."): t for key, t in content.tensors.items() if "qkv" in key
    }
    assert {name: tuple(tensor.shape) for name, tensor in fused.items()} == {
        U: (36, 6), V: (6, 8), GAIN: (36,), "alpha": (), "diff_b": (36,),
    }  # fmt: skip
    layers, errors = import_layers(content.tensors, content.metadata, base(), NAMES)
    assert not errors
    assert [rank_of(layers[name]) for name in FUSED] == [1, 2, 3]


def test_some_rows_of_a_fused_weight_are_not_changed():
    adapted = trained("GatedToy", ("to_q", "to_v"))
    content = contents(adapted, "kohya")
    assert {*read(content).layers()} == {"to_q", "to_v"}


@torch.no_grad()
def test_it_is_converted_to_a_lora_and_to_a_matrix():
    for name, tensors in files.adapter_layers(trained("GatedToy")).items():
        weight = base().get_submodule(name).weight.detach()
        delta = layer_delta(tensors, weight)
        exact = convert.exact_lora(tensors, weight.shape)
        nearest = convert.nearest_lora(tensors, weight, rank=3)
        full = convert.full_tensors(tensors, weight)
        assert [algorithm_name(t) for t in (exact, nearest.tensors, full)] == [
            "LoRA",
            "LoRA",
            "Full",
        ]
        assert nearest.error < 1e-5
        for converted in (exact, nearest.tensors, full):
            error = layer_delta(converted, weight) - delta
            assert error.norm() <= 1e-5 * delta.norm()


@torch.no_grad()
def test_without_an_exact_lora_the_error_names_it():
    tensors = files.adapter_layers(trained("PlainToy"))["linear"]
    weight = base().linear.weight.detach()
    with pytest.raises(AdapterError, match="PlainToy is not a LoRA"):
        convert.exact_lora(tensors, weight.shape)
    nearest = convert.nearest_lora(tensors, weight, rank=1)
    delta = layer_delta(tensors, weight)
    assert (layer_delta(nearest.tensors, weight) - delta).norm() <= 1e-5 * delta.norm()


@every_toy
@torch.no_grad()
def test_it_is_merged(algorithm):
    adapted = trained(algorithm)
    expected, fresh = adapted.model(INPUT), base()
    adapted.merge_into(fresh)
    torch.testing.assert_close(fresh(INPUT), expected, rtol=0, atol=1e-5)
    adapted.merge()
    torch.testing.assert_close(adapted.model(INPUT), expected, rtol=0, atol=1e-5)
    adapted.unmerge()
    assert adapted.model.linear.base_layer.weight.equal(base().linear.weight)


@every_toy
def test_dropped_ranks_and_modules(algorithm):
    torch.manual_seed(0)
    adapted = trained(algorithm, steps=0, rank_dropout=0.5)
    with torch.no_grad():
        for parameter in adapted.named_parameters().values():
            parameter.add_(0.1)
    outputs = [adapted.model(INPUT) for _ in range(6)]
    assert any(not output.equal(outputs[0]) for output in outputs)
    dropped = trained(algorithm, steps=0, module_dropout=0.9999999)
    with torch.no_grad():
        for parameter in dropped.named_parameters().values():
            parameter.add_(0.1)
    torch.testing.assert_close(dropped.model(INPUT), base()(INPUT), rtol=0, atol=1e-6)


def test_facts_about_it():
    tensors = files.adapter_layers(trained("GatedToy", ("linear",)))["linear"]
    assert guess_weight_shape({name: tuple(t.shape) for name, t in tensors.items()}) == (8, 8)
    assert network_metadata({"linear": tensors}) == {
        "ss_network_module": "lycoris.kohya", "ss_network_dim": "1", "ss_network_alpha": "0.5",
        "ss_network_args": '{"algo": "gated"}',
    }  # fmt: skip
    plain = files.adapter_layers(trained("PlainToy", ("linear",)))["linear"]
    assert guess_weight_shape({name: tuple(t.shape) for name, t in plain.items()}) == (1, 1)
    assert network_metadata({"linear": plain})["ss_network_args"] == '{"algo": "plaintoy"}'
    scales = trained("GatedToy", ("linear",)).learning_rate_scales(16.0)
    assert scales == {
        f"linear.{U}": 16.0,
        f"linear.{V}": 1.0,
        f"linear.{GAIN}": 1.0,
        "linear.diff_b": 1.0,
    }


def test_its_errors_are_those_of_every_algorithm():
    content = contents(trained("GatedToy"), "kohya")
    del content.tensors[f"lora_unet_in.{V}"]
    content.tensors[f"lora_unet_c.{GAIN}"] = torch.full((8,), torch.nan)
    content.tensors[f"lora_unet_final_1.{U}"] = torch.ones(3)
    with pytest.raises(AdapterError) as caught:
        read(content)
    text = str(caught.value)
    assert f"linear: {V} is missing" in text
    assert f"conv: {GAIN}: not finite" in text
    assert f"swapped: {U} is (3,): not a matrix" in text


def test_the_config_accepts_it_and_rejects_options_of_others():
    plan = AdapterPlan(AdapterConfig(targets=("linear",)), "GatedToy", 2)
    assert plan.specs(base(), {})["linear"].algorithm == "GatedToy"
    plan = AdapterPlan(AdapterConfig(targets=("linear",), block_size=4), "GatedToy", 2)
    with pytest.raises(
        AdapterError, match=r"no adapted layer \(GatedToy\) supports(.|\n)*block_size = 4"
    ):
        plan.specs(base(), {})


def test_a_saved_state_is_loaded():
    adapted = trained("GatedToy")
    state = adapted.state_dict()
    other = attach(copy.deepcopy(base()), adapted.specs(), seed=1)
    other.load_state_dict(state)
    assert other.model(INPUT).equal(adapted.model(INPUT))
    layers, errors = import_layers({**state, **adapted.alphas()}, {}, base(), NAMES)
    assert not errors
    assert {algorithm_name(tensors) for tensors in layers.values()} == {"GatedToy"}


def texts_in(path: Path) -> set[str]:
    """All strings of a file but docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {
        node.value for node in constants if isinstance(node.value, str) and node not in docstrings
    }


OWN_FILES = {f"{module.replace('.', '/')}.py" for module in ALGORITHMS.values()}
# the default, and the names of tensors in files of other programs
EXCEPTIONS = {
    "lora_algos/__init__.py": {*ALGORITHMS},
    "lora_algos/config.py": {"LoRA"},
    "lora_algos/low_rank.py": {"lora_up.weight", "lora_down.weight"},
    "lora_algos/peft_layers.py": {"lora_magnitude_vector"},
    "adapter_files/keys.py": {
        "lora_up.weight",
        "lora_down.weight",
        "lora_magnitude_vector",
        "diff",
    },
}
OTHER_FILES = [
    path
    for folder in ("lora_algos", "adapter_files")
    for path in sorted((PROJECT / folder).glob("*.py"))
    if str(path.relative_to(PROJECT)) not in OWN_FILES
]


@pytest.mark.parametrize("path", OTHER_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_other_file_names_an_algorithm_or_its_tensors(path, monkeypatch):
    for name in TOYS:
        monkeypatch.delitem(ALGORITHMS, name)
    names = {*ALGORITHMS} | {n for a in all_algorithms() for n in a.traits.names}
    assert texts_in(path) & names == EXCEPTIONS.get(str(path.relative_to(PROJECT)), set())
