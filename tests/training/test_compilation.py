"""Blocks are compiled once for each class and size: no graph break, no compilation after the first step."""

import copy

import pytest
import torch
from helpers.adapter_cases import SPECS, randomized
from helpers.family_cases import Case, cases, collate, family_of
from helpers.predictions import rows_of
from torch import Tensor, nn

from common.errors import ConfigError
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach
from lora_algos.config import LayerSpec
from lora_algos.targets import adaptable_layers
from training import compilation, gradient_checkpointing
from training.compilation import CompileCounts, Compiled, compiler_error, uses_compiler

OF_16_CHANNELS = ("sd3", "flux1-dev", "chroma", "z_image")
CASES = [case for case in cases() if str(case) in OF_16_CHANNELS]
QUICK_FAMILIES = ("sd3", "z_image")
"""Families whose blocks compile in seconds."""
SIZES = ((8, 8), (8, 12))
"""Heights and widths of latents: two buckets."""


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch):
    """A backend that traces both passes and generates no code; tests of others set theirs."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    compilation.compiled.cache_clear()
    yield
    torch._dynamo.reset()


def adapted_denoiser(case: Case) -> AdaptedModel:
    denoiser = family_of(case).load_denoiser(torch.float32).train()
    adapted = attach(denoiser, dict.fromkeys(adaptable_layers(denoiser), LayerSpec(2, 2.0)), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.named_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted


def gradients(case: Case, adapted: AdaptedModel, rows: list, size: tuple[int, int]) -> list[Tensor]:
    """The gradients of one training step."""
    family = family_of(case)
    noisy = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1))
    adapted.model.zero_grad()
    prediction = family.predict(
        adapted.model, noisy, torch.tensor([700.0, 300.0]), collate(family, rows)
    )
    prediction.square().mean().backward()
    return [parameter.grad for parameter in adapted.named_parameters().values()]


@pytest.mark.parametrize(
    "is_checkpointed", [pytest.param(False, marks=pytest.mark.long), True], ids=["", "checkpointed"]
)
@pytest.mark.parametrize(
    "case",
    [
        case if case.family in QUICK_FAMILIES else pytest.param(case, marks=pytest.mark.long)
        for case in CASES
    ],
    ids=str,
)
def test_a_step_is_the_same_and_compiles_once_per_size(case, is_checkpointed):
    family, rows = family_of(case), rows_of(case)
    plain = adapted_denoiser(case)
    adapted = copy.deepcopy(plain)
    blocks = family.blocks(adapted.model, 1)
    names = compilation.apply(blocks)
    assert names
    if is_checkpointed:
        gradient_checkpointing.apply(adapted.model, blocks)
    before = CompileCounts.now()
    for size in SIZES:
        expected = gradients(case, plain, rows, size)
        for mine, other in zip(gradients(case, adapted, rows, size), expected, strict=True):
            assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-9
    first = CompileCounts.now()
    assert first.num_graphs >= before.num_graphs + len(SIZES)
    assert first.num_breaks == before.num_breaks
    num_classes = len({type(adapted.model.get_submodule(name)) for name in names})
    # blocks of a class may differ, such as the last one of SD3, which has no text output
    assert first.num_graphs - before.num_graphs <= len(SIZES) * (num_classes + 1)
    for size in SIZES:
        gradients(case, adapted, rows, size)
    assert CompileCounts.now() == first, "nothing is compiled after the first step of a size"


def test_names_and_classes_stay(options):
    case = CASES[0]
    adapted = adapted_denoiser(case)
    expected = {name: type(module).__name__ for name, module in adapted.model.named_modules()}
    keys = list(adapted.model.state_dict())
    compilation.apply(family_of(case).blocks(adapted.model, 1))
    assert {
        name: type(module).__name__ for name, module in adapted.model.named_modules()
    } == expected
    assert list(adapted.model.state_dict()) == keys
    assert any(isinstance(module, Compiled) for module in adapted.model.modules())


def test_a_machine_without_a_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def fail():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
    cpu = torch.device("cpu")
    assert "apt install g++" in compiler_error(cpu)
    with pytest.raises(ConfigError, match=r"--compile blocks: there is no C\+\+ compiler"):
        uses_compiler("blocks", cpu)


def test_auto_compiles_on_gpus_only():
    assert not uses_compiler("auto", torch.device("cpu"))
    assert not uses_compiler("none", torch.device("cuda"))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_run_compiles(backend, options, run_here, monkeypatch, capsys):
    monkeypatch.setattr(compilation, "BACKEND", backend)
    assert run_here([*options, "--compile=blocks", "--gradient_checkpointing"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("compiled ")]
    assert "with 0 graph breaks; validation and first step took" in line


def test_accelerates_own_compilation_is_refused(options, run_here, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    assert run_here(options) == 2
    assert (
        "dynamo_backend inductor. Leave it at no: --compile blocks decides"
        in capsys.readouterr().err
    )


class TwoLayers(nn.Module):
    """Two blocks of one class, which share what is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("algorithm", SPECS)
@torch.no_grad()
def test_compiled_blocks_see_the_strength(algorithm, monkeypatch):
    """Also after they were compiled at strength 1, as by a sample or a validation."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    compilation.compiled.cache_clear()
    torch._dynamo.reset()
    model = nn.ModuleDict({"a": TwoLayers(), "b": TwoLayers()}).eval()
    names = ("a.first", "a.second", "b.first", "b.second")
    adapted = randomized(attach(model, dict.fromkeys(names, SPECS[algorithm]), seed=0))
    x = torch.randn(4, 8)
    expected = {}
    for strength in (1.0, 0.5, -1.0):
        with adapted.at_strength(strength):
            expected[strength] = model["b"](model["a"](x))
    compilation.apply({"a": model["a"], "b": model["b"]})
    for strength in (1.0, 0.5, 1.0, -1.0, 0.5):
        with adapted.at_strength(strength):
            output = model["b"](model["a"](x))
        torch.testing.assert_close(output, expected[strength], rtol=0, atol=1e-5)
    assert (expected[0.5] - expected[1.0]).abs().max() > 1e-3
