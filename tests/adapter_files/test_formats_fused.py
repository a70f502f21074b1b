"""Adapters of layers that the original model has fused (q, k, v; q, k, v, mlp) or with swapped halves: what ComfyUI
makes of every file is what was trained, and files trained on the original model's weights are read."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from helpers.adapter_cases import ALL_SPECS, SPECS, every_spec, randomized, spec_of
from helpers.comfy_apply import applied
from helpers.comfy_keys import Place
from torch import Tensor, nn

from adapter_files import files
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings
from adapter_files.verification import MAX_ERROR, verify_content
from adapter_files.writers import FileContent, preferred_format
from common.errors import AdapterError
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach, attach_from_file
from lora_algos.config import LayerSpec
from lora_algos.detection import layer_delta

SLICES = {
    "attn.to_q": ("block.qkv", 0, 24), "attn.to_k": ("block.qkv", 24, 24), "attn.to_v": ("block.qkv", 48, 24),
    "single.to_q": ("single.linear1", 0, 24), "single.to_k": ("single.linear1", 24, 24),
    "single.to_v": ("single.linear1", 48, 24), "single.proj_mlp": ("single.linear1", 72, 48),
}  # fmt: skip
SWAPPED = {"norm_out": "final.1", "odd_out": "odd.1"}  # 24 rows in 4 blocks of 6, 18 in 3
NATIVE = {
    **{n: native for n, (native, _, _) in SLICES.items()},
    **SWAPPED,
    "plain": "plain_in",
    "norm_q": "q_norm",
}
PREFIX = "transformer."
LINEAR = [*SLICES, *SWAPPED, "plain"]
ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v"]
FORMS = {
    "comfyui": ("comfyui", PREFIX),
    "comfyui without names of parts": ("comfyui", ""),
    "kohya": ("kohya", PREFIX),
    "diffusers": ("diffusers", PREFIX),
}
every_form = pytest.mark.parametrize("form", FORMS)


def names(by_diffusers: str = PREFIX) -> LayerSpellings:
    rows = {layer: (first, count) for layer, (_, first, count) in SLICES.items()}
    return LayerSpellings(NATIVE, "transformer", True, rows, frozenset(SWAPPED), by_diffusers)


@functools.cache
def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Module()
        attn, single = nn.Module(), nn.Module()
        for name in ("to_q", "to_k", "to_v"):
            attn.add_module(name, nn.Linear(12, 24))
            single.add_module(name, nn.Linear(12, 24, bias=False))
        single.add_module("proj_mlp", nn.Linear(12, 48, bias=False))
        model.add_module("attn", attn)
        model.add_module("single", single)
        for name, layer in {
            "norm_out": nn.Linear(12, 24),
            "odd_out": nn.Linear(12, 18),
            "plain": nn.Linear(12, 24),
        }.items():
            model.add_module(name, layer)
        model.add_module("norm_q", nn.RMSNorm(8))
        return model


def toy() -> nn.Module:
    return copy.deepcopy(base())


def trained(specs: dict[str, LayerSpec]) -> AdaptedModel:
    return randomized(attach(toy(), specs, seed=0))


def table(by_diffusers: str) -> dict[str, Place]:
    """As ComfyUI's: native names always, diffusers' if it has them."""
    found = {}
    for native in NATIVE.values():
        place = Place(f"{native}.weight")
        found |= {
            f"diffusion_model.{native}": place,
            f"lora_unet_{native.replace('.', '_')}": place,
        }
    if by_diffusers:
        for layer, native in NATIVE.items():
            rows = SLICES[layer][1:] if layer in SLICES else None
            found[by_diffusers + layer] = Place(f"{native}.weight", rows, layer in SWAPPED)
    return found


def swap(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[len(tensor) // 2 :], tensor[: len(tensor) // 2]])


def native_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights and biases as ComfyUI has them."""
    parts: dict[str, list[Tensor]] = {}
    for layer, native in NATIVE.items():  # in the order of the rows
        for kind, tensor in model.get_submodule(layer).named_parameters():
            tensor = tensor.detach().double()
            parts.setdefault(f"{native}.{kind}", []).append(
                swap(tensor) if layer in SWAPPED else tensor
            )
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def merged(adapted: AdaptedModel) -> dict[str, Tensor]:
    """The base's weights with the update worked in, as ComfyUI has them, in fp64."""
    changed = toy().double()
    with torch.no_grad():
        for name, layer in adapted.layers().items():
            target = changed.get_submodule(name)
            target.weight += layer.delta_weight()
            if layer.diff_b is not None:
                target.bias += layer.diff_b
    return native_state(changed)


def assert_alike(there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(
            there[name], tensor, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def content_of(adapted: AdaptedModel, form: str) -> FileContent:
    file_format, by_diffusers = FORMS[form]
    layers = files.adapter_layers(adapted)
    content = files.file_content(
        layers, adapted.model, names(by_diffusers), file_format, torch.float32
    )
    assert verify_content(content, layers, adapted.model, names(by_diffusers)) <= MAX_ERROR
    return content


def read(content: FileContent, by_diffusers: str = PREFIX) -> AdaptedModel:
    model = toy()
    layers, unknown = import_layers(content.tensors, content.metadata, model, names(by_diffusers))
    return attach_from_file(model, layers, unknown)


def check(adapted: AdaptedModel, form: str) -> FileContent:
    """ComfyUI, and we, make of the file what was trained."""
    content = content_of(adapted, form)
    by_diffusers = FORMS[form][1]
    expected = merged(adapted)
    changed = {
        name for name, tensor in expected.items() if not tensor.equal(native_state(base())[name])
    }
    assert changed
    assert_alike(applied(content.tensors, table(by_diffusers), native_state(base())), expected)
    again = read(content, by_diffusers)
    assert again.layers().keys() == adapted.layers().keys()
    assert_alike(merged(again), expected)
    return content


def of_form(spec: LayerSpec, form: str) -> LayerSpec:
    if form == "diffusers" and spec.algorithm != "LoRA":
        pytest.skip("diffusers' format holds LoRA, and DoRA, which ComfyUI does not read there")
    return replace(spec, bias=form != "diffusers")


@every_form
@every_spec
def test_comfyui_makes_of_every_file_what_was_trained(spec, form):
    spec = of_form(spec, form)
    specs = dict.fromkeys(LINEAR, spec)
    if spec.algorithm == "BOFT":
        del specs["odd_out"]  # 18 rows have no butterfly of 6
    if form != "diffusers":
        specs["norm_q"] = LayerSpec(algorithm="Full")
    check(trained(specs), form)


@every_form
@every_spec
def test_some_parts_of_a_fused_weight_alone(spec, form):
    specs = dict.fromkeys(["attn.to_q", "attn.to_v", "single.to_k"], of_form(spec, form))
    check(trained(specs), form)


@every_form
def test_parts_of_different_ranks_and_alphas(form):
    for algorithm in ("LoRA", "LoHa", "DoRA"):
        if form == "diffusers" and algorithm != "LoRA":
            continue
        specs = {name: LayerSpec(2 + i, 0.5 + i, algorithm) for i, name in enumerate(SLICES)}
        adapted = trained(specs)
        check(adapted, form)
        again = read(content_of(adapted, form), FORMS[form][1])
        assert {n: s.rank for n, s in again.specs().items()} == {
            n: s.rank for n, s in specs.items()
        }


@every_form
def test_parts_with_different_algorithms(form):
    if form == "diffusers":
        return
    algorithms = ["LoRA", "OFT", "LoKr", "BOFT", "DoRA", "GLoRA", "Full"]
    check(trained({name: spec_of(a) for name, a in zip(SLICES, algorithms, strict=True)}), form)


@pytest.mark.parametrize("form", ["comfyui without names of parts", "kohya"])
@pytest.mark.parametrize("algorithm", SPECS)
def test_what_is_fused_and_swapped_keeps_its_algorithm_where_it_can(algorithm, form):
    again = read(
        content_of(trained(dict.fromkeys([*ATTENTION, "norm_out"], SPECS[algorithm])), form),
        FORMS[form][1],
    )
    fusable = algorithm not in ("LoKr", "GLoRA")
    found = {name: spec.algorithm for name, spec in again.specs().items()}
    assert {found[name] for name in ATTENTION} == {algorithm if fusable else "Full"}
    assert found["norm_out"] == (algorithm if algorithm != "BOFT" else "Full")


@pytest.mark.parametrize("algorithm", SPECS)
def test_parts_keep_their_algorithm_where_comfyui_has_names_for_them(algorithm):
    again = read(content_of(trained(dict.fromkeys(SLICES, SPECS[algorithm])), "comfyui"))
    assert {spec.algorithm for spec in again.specs().values()} == {algorithm}


def test_biases_of_parts_are_written_once_with_zeros_where_there_is_none():
    specs = {"attn.to_q": spec_of("LoRA"), "attn.to_v": replace(spec_of("LoRA"), bias=True)}
    adapted = trained(specs)
    content = check(adapted, "comfyui")
    assert [name for name, spec in read(content).specs().items() if spec.bias] == ["attn.to_v"]
    tensors = content.tensors
    bias = tensors.pop("diffusion_model.block.qkv.diff_b")
    assert not [key for key in tensors if "diff_b" in key]
    assert bias.shape == (72,)
    assert not bias[:48].any()
    assert bias[48:].equal(adapted.layers()["attn.to_v"].diff_b.detach())


def test_a_lora_that_changes_nothing_is_no_fault_of_a_fused_file():
    adapted = attach(toy(), dict.fromkeys(SLICES, spec_of("LoRA")), seed=0)
    for form in FORMS:
        again = read(content_of(adapted, form), FORMS[form][1])
        assert again.layers().keys() == adapted.layers().keys()
    with torch.no_grad():
        adapted.named_parameters()["attn.to_k.lora_up.weight"].fill_(0.1)
    assert {*read(content_of(adapted, "kohya")).layers()} == {
        "attn.to_k",
        *(n for n in SLICES if "single" in n),
    }


@pytest.mark.parametrize("spec", [ALL_SPECS["LoRA"], ALL_SPECS["Full"]], ids=["LoRA", "Full"])
def test_the_default_format_is_the_one_that_the_most_programs_read(spec):
    layers = files.adapter_layers(trained({"attn.to_q": spec, "plain": spec}))
    asked = ("diffusers", "comfyui")
    wanted = "diffusers" if spec.algorithm == "LoRA" else "comfyui"
    assert preferred_format(asked, layers, names()) == wanted
    assert (
        preferred_format(asked, layers, replace(names(), original_only=frozenset({"plain"})))
        == "comfyui"
    )
    assert preferred_format(("kohya",), layers, names()) == "kohya"
    with_bias = {name: {**tensors, "diff_b": torch.ones(24)} for name, tensors in layers.items()}
    assert preferred_format(asked, with_bias, names()) == "comfyui"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 4


def lora_tensors(rows: int) -> dict[str, Tensor]:
    return {
        "lora_up.weight": noise(rows, 3),
        "lora_down.weight": noise(3, 12),
        "alpha": torch.tensor(2.0),
    }


# tensors of an adapter that was trained on a weight of so many rows and 12 columns -> the algorithms it is read as,
# of three layers of 24 rows, and of two swapped halves
TRAINED_ON_WHOLE = {
    "LoRA": (lora_tensors, "LoRA", "LoRA"),
    "LoRA without alpha": (lambda n: {k: t for k, t in lora_tensors(n).items() if k != "alpha"}, "LoRA", "LoRA"),
    "LoRA of PEFT": (lambda n: {"lora_B.weight": noise(n, 3), "lora_A.weight": noise(3, 12)}, "LoRA", "LoRA"),
    "LoHa": (
        lambda n: {"hada_w1_a": noise(n, 2), "hada_w1_b": noise(2, 12), "hada_w2_a": noise(n, 2, seed=9),
                   "hada_w2_b": noise(2, 12, seed=9), "alpha": torch.tensor(1.0)}, "LoHa", "LoHa"),
    "LoKr by rows of w1": (lambda n: {"lokr_w1": noise(6, 4), "lokr_w2": noise(n // 6, 3)}, "LoKr", "LoKr"),
    "LoKr of low rank": (
        lambda n: {"lokr_w1": noise(6, 4), "lokr_w2_a": noise(n // 6, 2), "lokr_w2_b": noise(2, 3),
                   "alpha": torch.tensor(3.0)}, "LoKr", "LoKr"),
    "LoKr across rows of w1": (
        lambda n: {"lokr_w1": noise(4 if n > 24 else 3, 4), "lokr_w2": noise(n // (4 if n > 24 else 3), 3)},
        "Full", "Full"),
    "LoKr of one row": (lambda n: {"lokr_w1": noise(1, 4), "lokr_w2": noise(n, 3)}, "LoKr", "Full"),
    "OFT": (lambda n: {"oft_blocks": noise(n // 6, 6, 6), "alpha": torch.tensor(0.0)}, "OFT", "OFT"),
    "OFT with a constraint": (lambda n: {"oft_blocks": noise(n // 6, 6, 6), "alpha": torch.tensor(0.7)}, "OFT", "OFT"),
    "BOFT of two stages": (
        lambda n: {"oft_blocks": noise(2, n // 6, 6, 6), "alpha": torch.tensor(0.7)}, "BOFT", "BOFT"),
    "GLoRA": (
        lambda n: {"a1.weight": noise(12, 2), "a2.weight": noise(2, 12), "b1.weight": noise(n, 2),
                   "b2.weight": noise(2, 12), "alpha": torch.tensor(1.0)}, "GLoRA", "GLoRA"),
    "diff": (lambda n: {"diff": noise(n, 12)}, "Full", "Full"),
    "diff and diff_b": (lambda n: {"diff": noise(n, 12), "diff_b": noise(n)}, "Full", "Full"),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["diffusion_model.{}", "lora_unet_{_}"])
@pytest.mark.parametrize("case", TRAINED_ON_WHOLE)
def test_files_trained_on_the_original_weight_are_read(case, prefix):
    make, of_parts, of_swapped = TRAINED_ON_WHOLE[case]
    tensors = {}
    for native, rows in (("block.qkv", 72), ("final.1", 24)):
        spelling = prefix.replace("{}", native).replace("{_}", native.replace(".", "_"))
        tensors |= {f"{spelling}.{name}": tensor for name, tensor in make(rows).items()}
    adapted = read(FileContent(tensors))
    found = {name: spec.algorithm for name, spec in adapted.specs().items()}
    assert found == {**dict.fromkeys(ATTENTION, of_parts), "norm_out": of_swapped}
    assert_alike(merged(adapted), applied(tensors, table(PREFIX), native_state(base())))


def test_a_dora_trained_on_the_original_weight_is_read():
    """As trainers write it, with ||W + dW|| below the magnitude, not ComfyUI's ||W||."""
    tensors, native = {}, native_state(base())
    for name in ("block.qkv", "final.1"):
        weight, parts = native[f"{name}.weight"], lora_tensors(len(native[f"{name}.weight"]))
        moved = (
            weight + 2 / 3 * parts["lora_up.weight"].double() @ parts["lora_down.weight"].double()
        )
        magnitude = noise(len(weight), 1).double().abs() + 0.5
        native[f"{name}.weight"] = magnitude * moved / moved.norm(dim=1, keepdim=True)
        tensors |= {
            f"diffusion_model.{name}.{n}": t
            for n, t in {**parts, "dora_scale": magnitude.float()}.items()
        }
    assert_alike(merged(read(FileContent(tensors))), native)


def test_a_part_by_diffusers_name_beside_the_whole_is_refused():
    tensors = {
        **{
            f"diffusion_model.block.qkv.{name}": tensor for name, tensor in lora_tensors(72).items()
        },
        **{f"transformer.attn.to_q.{name}": tensor for name, tensor in lora_tensors(24).items()},
    }
    with pytest.raises(AdapterError, match=r"the same tensor as diffusion_model\.block\.qkv"):
        read(FileContent(tensors))


BROKEN = {
    "blocks across layers": ({"oft_blocks": torch.ones(4, 18, 18)}, "blocks of 18 rows mix rows of this layer"),
    "too few rows": ({"diff": torch.ones(48, 12)}, r"diff is \(48, 12\), and the original model's weight has 72 rows"),
    "a short bias": ({"diff": noise(72, 12), "diff_b": torch.ones(24)}, r"diff_b is \(24,\) and should be \(72,\)"),
    "half a LoRA": ({"lora_up.weight": torch.ones(72, 2)}, "lora_down.weight is missing"),
    "NaN": ({"diff": torch.full((72, 12), torch.nan)}, "not finite"),
    "a LoKr that divides nothing": ({"lokr_w1": torch.ones(7, 4), "lokr_w2": torch.ones(10, 3)}, "has 72 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_split_is_refused_by_layer(case):
    tensors, words = BROKEN[case]
    file = FileContent(
        {f"diffusion_model.block.qkv.{name}": tensor for name, tensor in tensors.items()}
    )
    with pytest.raises(AdapterError, match=rf"attn.to_q: (.|\n)*{words}"):
        read(file)


def test_a_split_lora_is_one_of_the_rank_that_was_put_in():
    """The ranks of other layers are dropped from the block diagonal, and alpha is reduced with them."""
    adapted = trained({name: LayerSpec(2 + i, 4.0) for i, name in enumerate(ATTENTION)})
    kohya = content_of(adapted, "kohya").tensors
    assert kohya["lora_unet_block_qkv.lora_up.weight"].shape == (72, 9)
    layers, _ = import_layers(kohya, {}, toy(), names())
    for i, name in enumerate(ATTENTION):
        assert layers[name]["lora_down.weight"].shape == (2 + i, 12)
        expected = layer_delta({**files.adapter_layers(adapted)[name]}, torch.zeros(24, 12))
        torch.testing.assert_close(layer_delta(layers[name], torch.zeros(24, 12)), expected)
