"""The commands on a single file of a small FLUX, in which several layers share a tensor."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from helpers.adapter_cases import SPECS, randomized
from helpers.tool_cases import relative_error, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tools.base_model
from adapter_files import files
from adapter_files.reader import import_layers
from adapter_files.spellings import LayerSpellings, layer_spellings
from lora_algos.adapted_model import AdaptedModel
from lora_algos.attach import attach, attach_from_file
from lora_algos.config import LayerSpec
from lora_algos.targets import norm_layers
from models.base import ModelFamily
from models.config import ModelConfig
from models.families.flux_names import FLUX_TABLE
from models.families.wan_names import WAN_NAMES
from models.layer_names.names import LayerNames
from models.layer_names.tables import TableNames

FLUX = {
    "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 3, "in_channels": 8,
    "joint_attention_dim": 12, "pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True,
}  # fmt: skip
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 12,
    "freq_dim": 8, "ffn_dim": 32, "num_layers": 1,
}  # fmt: skip
LAYERS = [
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.add_k_proj",
    "single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_mlp", "norm_out.linear", "x_embedder",
]  # fmt: skip
PREFIX = "model.diffusion_model."


class Small(ModelFamily):
    """The members of a family that the commands need for a single file."""

    name, denoiser_component = "small", "transformer"
    layer_names: LayerNames = TableNames(table=FLUX_TABLE)

    @property
    def files(self) -> Any:
        path = Path(str(self.config.path))
        return SimpleNamespace(path=path, is_single_file=True, has_plain_tensors=True)

    def empty_denoiser(self, device: str = "meta") -> nn.Module:
        with torch.device("meta"):
            return self.denoiser()

    def denoiser(self) -> nn.Module:
        return FluxTransformer2DModel(**FLUX)

    def identity_files(self, role: str) -> list[Path]:
        return [self.files.path]

    def stored_keys(self, denoiser: nn.Module) -> dict[str, str]:
        with safe_open(self.files.path, framework="pt") as file:
            return self.layer_names.file_keys(denoiser, set(file.keys()))

    def file_metadata(self, denoiser: nn.Module) -> dict[str, str]:
        return {"ss_base_model_version": "small"}


class SmallWan(Small):
    """A model with parameters outside of layers."""

    layer_names = WAN_NAMES

    def denoiser(self) -> nn.Module:
        return WanTransformer3DModel(**WAN)


Small.__abstractmethods__ = SmallWan.__abstractmethods__ = frozenset()


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setattr(tools.base_model, "get_family", Small)


def denoiser(family: type[Small] = Small) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family(ModelConfig()).denoiser()


def native_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights under the names of the original model, with norms as in FLUX's file."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for layer, native in Small.layer_names.original(model).items():
        for kind, tensor in model.get_submodule(layer).named_parameters():
            tensor = (
                torch.cat(tensor.detach().chunk(2)[::-1])
                if native.swapped_halves
                else tensor.detach()
            )
            kind = "scale" if native.name.endswith("_norm") else kind
            parts.setdefault(f"{PREFIX}{native.name}.{kind}", []).append(
                (native.row_slice[0] if native.row_slice else 0, tensor)
            )
    return {
        key: torch.cat([t for _, t in sorted(found, key=lambda part: part[0])])
        for key, found in parts.items()
    }


def model_file(path: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    save_file(
        {**{key: t.to(dtype) for key, t in native_state(model).items()}, "vae.x": torch.ones(3)},
        path,
    )
    return path


def spelt(path: Path) -> LayerSpellings:
    return layer_spellings(Small(ModelConfig(str(path))), denoiser())


def trained(specs: dict[str, LayerSpec]) -> AdaptedModel:
    return randomized(attach(denoiser(), specs, seed=0), 0.1)


def everywhere(algorithm: str) -> AdaptedModel:
    spec = LayerSpec(2, 3.0, algorithm, SPECS[algorithm].options, bias=True)
    norms = dict.fromkeys(norm_layers(denoiser()), LayerSpec(algorithm="Full"))
    return trained(dict.fromkeys(LAYERS, spec) | norms)


def saved(path: Path, adapted: AdaptedModel, base: Path, file_format: str = "comfyui") -> Path:
    layers = files.adapter_layers(adapted)
    content = files.file_content(layers, adapted.model, spelt(base), file_format, torch.float32)
    save_file(content.tensors, path, content.metadata)
    return path


def reread(path: Path, base: Path) -> AdaptedModel:
    model = denoiser()
    return attach_from_file(model, *import_layers(*files.read_adapter(path), model, spelt(base)))


def assert_same(there: AdaptedModel, here: AdaptedModel) -> None:
    found, wanted = dict(there.deltas()), dict(here.deltas())
    assert found.keys() == wanted.keys()
    assert max(relative_error(found[name], wanted[name]) for name in wanted) < 2e-5
    for name, layer in here.layers().items():
        if layer.diff_b is not None:
            torch.testing.assert_close(there.layers()[name].diff_b, layer.diff_b)


@pytest.mark.parametrize("file_format", ["comfyui", "kohya"])
@pytest.mark.parametrize("algorithm", SPECS)
def test_merge_changes_the_rows_of_each_layer(algorithm, file_format, tmp_path):
    base, adapted = model_file(tmp_path / "base.safetensors", denoiser()), everywhere(algorithm)
    lora, out = (
        saved(tmp_path / "lora.safetensors", adapted, base, file_format),
        tmp_path / "out.safetensors",
    )
    assert run("merge", base, out, "--lora", lora) == 0
    expected = denoiser()
    adapted.merge_into(expected)
    merged, plain = load_file(out), load_file(base)
    for key, tensor in native_state(expected).items():
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=2e-6)
    changed = {key for key in plain if not merged[key].equal(plain[key])}
    assert f"{PREFIX}double_blocks.0.img_attn.qkv.bias" in changed
    assert f"{PREFIX}double_blocks.0.img_mlp.0.weight" not in changed
    qkv = f"{PREFIX}double_blocks.0.img_attn.qkv.weight"
    assert merged[qkv][24:48].equal(plain[qkv][24:48])  # to_k, which is not adapted


def test_merge_rounds_only_what_it_changes(tmp_path):
    base = model_file(tmp_path / "base.safetensors", denoiser(), torch.bfloat16)
    lora, out = (
        saved(tmp_path / "lora.safetensors", everywhere("LoRA"), base),
        tmp_path / "out.safetensors",
    )
    assert run("merge", base, out, "--lora", lora) == 0
    merged, plain = load_file(out), load_file(base)
    qkv = f"{PREFIX}double_blocks.0.img_attn.qkv.weight"
    assert merged[qkv].dtype == torch.bfloat16
    assert merged[qkv][24:48].equal(plain[qkv][24:48])
    assert not merged[qkv][:24].equal(plain[qkv][:24])


@pytest.mark.parametrize("file_format", ["comfyui", "kohya"])
@pytest.mark.parametrize("algorithm", SPECS)
def test_inspect_and_convert_read_the_rows_of_each_layer(algorithm, file_format, tmp_path, capsys):
    base, adapted = model_file(tmp_path / "base.safetensors", denoiser()), everywhere(algorithm)
    lora = saved(tmp_path / "lora.safetensors", adapted, base, file_format)
    assert run("inspect", lora, "--model", base) == 0
    whole = sum(float(delta.norm()) ** 2 for _, delta in adapted.deltas()) ** 0.5
    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all"))
    assert last.split()[1] == str(len(adapted.layers()))
    assert last.endswith(f"{whole:.4g}")
    for other in ("kohya", "comfyui"):
        out = tmp_path / f"{other}.safetensors"
        assert run("convert", lora, out, "--format", other, "--model", base) == 0
        assert_same(reread(out, base), adapted)


@pytest.mark.parametrize("algorithm", ["LoRA", "LoKr", "Full"])
def test_extract_finds_the_rows_of_each_layer(algorithm, tmp_path):
    base, tuned = model_file(tmp_path / "base.safetensors", denoiser()), denoiser()
    adapted = trained(dict.fromkeys(LAYERS, LayerSpec(2, 3.0, "LoRA")))
    adapted.merge_into(tuned)
    model_file(tmp_path / "tuned.safetensors", tuned)
    out = tmp_path / "out.safetensors"
    words = ["--algorithm", algorithm, *(["--rank", 2] if algorithm == "LoRA" else [])]
    assert run("extract", base, tmp_path / "tuned.safetensors", out, *words) == 0
    keys = load_file(out).keys()
    assert all(key.startswith("transformer.") for key in keys) or algorithm != "LoRA"
    found = reread(out, base)
    assert found.layers().keys() == adapted.layers().keys()
    if algorithm != "LoKr":
        assert_same(found, adapted)


def test_resize_keeps_the_rows_of_each_layer(tmp_path):
    base, adapted = model_file(tmp_path / "base.safetensors", denoiser()), everywhere("LoRA")
    lora, out = (
        saved(tmp_path / "lora.safetensors", adapted, base, "kohya"),
        tmp_path / "out.safetensors",
    )
    assert run("resize", lora, out, "--rank", 2, "--model", base) == 0
    assert_same(reread(out, base), adapted)


def test_a_file_with_missing_rows_is_incomplete(tmp_path, capsys):
    state = native_state(denoiser())
    key = f"{PREFIX}single_blocks.0.linear1.weight"
    save_file({**state, key: state[key][:100].clone()}, tmp_path / "base.safetensors")
    assert run("inspect", saved(tmp_path / "lora", everywhere("LoRA"), model_file(tmp_path / "whole", denoiser())),
               "--model", tmp_path / "base.safetensors") != 0  # fmt: skip
    assert f"{key}: (100, 24) in the file, (96, 24) by its config" in capsys.readouterr().err


def test_extract_lists_parameters_outside_of_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tools.base_model, "get_family", SmallWan)
    for name, change in (("base", 0.0), ("tuned", 0.5)):
        model = denoiser(SmallWan)
        with torch.no_grad():
            model.scale_shift_table += change
            model.blocks[0].scale_shift_table += change
            model.blocks[0].attn1.to_q.weight += change
        path = tmp_path / f"{name}.safetensors"
        table = WAN_NAMES.file_keys(model, ())
        save_file({table[n]: p.detach().contiguous() for n, p in model.named_parameters()}, path)
    out = tmp_path / "out.safetensors"
    assert (
        run(
            "extract",
            tmp_path / "base.safetensors",
            tmp_path / "tuned.safetensors",
            out,
            "--algorithm=LoRA",
            "--rank=1",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "it: scale_shift_table, |" in said
    assert "it: blocks.0.scale_shift_table, |" in said
    assert {key.rpartition(".lora")[0] for key in load_file(out) if "lora" in key} == {
        "diffusion_model.blocks.0.self_attn.q"
    }
