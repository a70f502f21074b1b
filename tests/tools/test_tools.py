"""The commands: the numbers of each one, computed in another way."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.adapter_file_cases import LAYERS, SPECS, names, unet, with_norms
from helpers.project import BASE, script
from helpers.tool_cases import (
    CASES,
    METADATA,
    adapter_file,
    assert_same_updates,
    base_file,
    base_folder,
    deltas,
    metadata_of,
    of_case,
    relative_error,
    run,
    unet_weights,
)
from safetensors.torch import load_file, save_file

from adapter_files import files
from adapter_files.reader import import_layers
from adapter_files.safetensors_stream import addnet_hashes

# inspect


def test_inspect_prints_the_content_of_a_file(tmp_path, capsys):
    path, adapted = of_case(tmp_path, "LoRA")
    assert run("inspect", path, "--model", BASE) == 0
    out = capsys.readouterr().out
    assert re.search(r"trigger words +a cat", out)
    assert re.search(r"tags +sofa 5, cat 3, dog 2", out)
    assert re.search(r"steps +12", out)
    assert "float32 x 20" in out
    assert "30 of 30 keys belong" in out
    norms = {name: float(delta.norm()) for name, delta in adapted.deltas()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    assert re.search(rf"all +10 +LoRA +4 +6 +{whole:.4g}", out)
    assert re.search(rf"conv_in +1 +LoRA +4 +6 +{norms['conv_in']:.4g}", out)


@pytest.mark.parametrize("case", CASES)
def test_inspect_without_a_model_prints_the_norms_that_do_not_need_it(case, tmp_path, capsys):
    path, adapted = of_case(tmp_path, case)
    assert run("inspect", path) == 0
    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all"))
    whole = sum(float(delta.norm()) ** 2 for _, delta in adapted.deltas()) ** 0.5
    needs = SPECS[case].algorithm in ("DoRA", "OFT", "BOFT", "GLoRA")
    assert last.endswith("needs --model" if needs else f"{whole:.4g}")


def test_inspect_names_the_keys_that_do_not_fit(tmp_path, capsys):
    content = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 2),
        "junk": torch.ones(1),
    }
    path, _ = of_case(tmp_path, "LoRA")
    save_file({**load_file(path), **content}, path)
    assert run("inspect", path, "--model", BASE) == 1
    out = capsys.readouterr().out
    assert (
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight (4, 2): the model has no layer"
        in out
    )
    assert "junk (1,): not a tensor of an adapter" in out


# convert


@pytest.mark.parametrize("file_format", ["kohya", "comfyui", "diffusers", "peft"])
@pytest.mark.parametrize("source", ["kohya", "comfyui", "diffusers", "peft"])
def test_convert_keeps_the_function_from_every_format_to_every_other(source, file_format, tmp_path):
    path, adapted = of_case(tmp_path, "LoRA", source)
    out = tmp_path / ("out" if file_format == "peft" else "out.safetensors")
    assert run("convert", path, out, "--format", file_format, "--model", BASE) == 0
    assert_same_updates(out, adapted)
    metadata = metadata_of(out / "adapter_model.safetensors" if file_format == "peft" else out)
    assert {k: v for k, v in metadata.items() if k in METADATA} == {
        **METADATA,
        "sshs_model_hash": metadata["sshs_model_hash"],
    }
    content = (out / "adapter_model.safetensors" if file_format == "peft" else out).read_bytes()
    assert metadata["sshs_model_hash"] == addnet_hashes(content)["sshs_model_hash"]


@pytest.mark.parametrize("case", CASES)
def test_convert_keeps_every_algorithm(case, tmp_path):
    path, adapted = of_case(tmp_path, case)
    out = tmp_path / "out.safetensors"
    assert run("convert", path, out, "--format", "comfyui", "--model", BASE) == 0
    assert_same_updates(out, adapted, 2e-5)
    assert run("convert", out, path, "--format", "kohya", "--model", BASE, "--overwrite") == 0
    assert_same_updates(path, adapted, 2e-5)


def test_convert_keeps_mixed_ranks_and_alphas_norms_and_biases(tmp_path):
    adapted = with_norms()
    path, out = adapter_file(tmp_path / "a.safetensors", adapted), tmp_path / "out.safetensors"
    assert run("convert", path, out, "--format", "comfyui", "--model", BASE) == 0
    assert_same_updates(out, adapted)
    assert len({float(t) for key, t in load_file(out).items() if key.endswith(".alpha")}) == 1
    there, _ = import_layers(*files.read_adapter(out), unet(), names())
    for name, layer in adapted.layers().items():
        assert (layer.diff_b is None) == ("diff_b" not in there[name])
        assert layer.diff_b is None or torch.equal(there[name]["diff_b"], layer.diff_b)


@pytest.mark.parametrize("case", ["LoHa", "LoKr", "LoKr both"])
def test_convert_lora_exact_is_exact(case, tmp_path):
    path, adapted = of_case(tmp_path, case)
    out = tmp_path / "out.safetensors"
    assert (
        run(
            "convert",
            path,
            out,
            "--format",
            "diffusers",
            "--convert",
            "lora-exact",
            "--model",
            BASE,
        )
        == 0
    )
    assert_same_updates(out, adapted)


def test_convert_full_and_lora_svd(tmp_path, capsys):
    path, adapted = of_case(tmp_path, "OFT")
    full, svd = tmp_path / "full.safetensors", tmp_path / "svd.safetensors"
    assert (
        run("convert", path, full, "--format", "kohya", "--convert", "full", "--model", BASE) == 0
    )
    assert_same_updates(full, adapted)
    capsys.readouterr()
    command = (
        "convert",
        path,
        svd,
        "--format",
        "kohya",
        "--convert",
        "lora-svd",
        "--rank",
        8,
        "--model",
        BASE,
    )
    assert run(*command) == 0
    there, here = deltas(svd), dict(adapted.deltas())
    error = sum(float((there[n] - here[n]).square().sum()) for n in here) ** 0.5
    whole = sum(float(here[n].square().sum()) for n in here) ** 0.5
    assert re.search(rf"all .* {error / whole:.2%}$", capsys.readouterr().out, re.M)
    best = (
        sum(float(torch.linalg.svdvals(d.flatten(1))[8:].square().sum()) for d in here.values())
        ** 0.5
    )
    assert error == pytest.approx(best, rel=1e-4)


def test_convert_rounds_and_drops_as_requested(tmp_path, capsys):
    path, adapted = of_case(tmp_path, "LoRA")
    out = tmp_path / "out.safetensors"
    words = ("--dtype", "bf16", "--drop", "lora_unet_mid.*", "--drop", ".*conv_in.*")
    assert run("convert", path, out, "--format", "kohya", "--model", BASE, *words) == 0
    left = {name for name in LAYERS if not name.startswith(("mid", "conv_in"))}
    assert deltas(out).keys() == left
    assert "left out by --drop: 18 keys" in capsys.readouterr().out
    assert {t.dtype for key, t in load_file(out).items() if "alpha" not in key} == {torch.bfloat16}
    here = dict(adapted.deltas())
    assert max(relative_error(d, here[n]) for n, d in deltas(out).items()) < 0.01


# merge


@pytest.mark.parametrize("shards", [1, 3])
def test_merge_equals_attach_and_merge(shards, tmp_path, capsys):
    source, out = base_folder(tmp_path / "base", shards), tmp_path / "out"
    lora, first = of_case(tmp_path, "LoRA with biases")
    oft, second = of_case(tmp_path, "OFT")
    assert (
        run("merge", source, out, "--lora", f"{lora}:0.5", "--lora", f"{oft}:-2", "--overwrite")
        == 0
    )
    assert "each dW is computed from the original W" in capsys.readouterr().out
    there, before = unet_weights(out), unet_weights(source)
    moved = dict(first.deltas()), dict(second.deltas())
    for name, weight in before.items():
        layer, kind = name.rsplit(".", 1)
        if layer in LAYERS and kind == "weight":
            weight = weight + 0.5 * moved[0][layer] - 2 * moved[1][layer]
        elif layer in LAYERS:
            weight = weight + 0.5 * first.layers()[layer].diff_b
        assert (there[name] - weight).abs().max() < 1e-6, name
    files = {p.relative_to(source) for p in source.rglob("*")}
    assert files == {p.relative_to(out) for p in out.rglob("*")}
    pipeline = StableDiffusionPipeline.from_pretrained(
        out, safety_checker=None, feature_extractor=None
    )
    assert torch.equal(pipeline.unet.state_dict()["conv_in.weight"], there["conv_in.weight"])


def test_merge_with_strength_one_equals_the_trainer(fp32_model, tmp_path):
    for case in ("LoRA", "DoRA", "LoKr"):
        path, adapted = of_case(tmp_path, case)
        out, merged = tmp_path / case, unet()
        assert run("merge", fp32_model, out, "--lora", path) == 0
        adapted.merge_into(merged)
        there = unet_weights(out)
        assert max(float((there[n] - p).abs().max()) for n, p in merged.state_dict().items()) < 1e-6


def test_merge_into_a_single_file_leaves_other_tensors_unchanged(tmp_path):
    source, out = (
        base_file(tmp_path / "base.safetensors", torch.float16),
        tmp_path / "out.safetensors",
    )
    path, adapted = of_case(tmp_path, "LoRA")
    assert run("merge", source, out, "--lora", path, "--config", BASE) == 0
    before, there = load_file(source), load_file(out)
    native = names().original
    changed = {
        f"model.diffusion_model.{native[name]}.weight": delta for name, delta in adapted.deltas()
    }
    assert list(before) == list(there)
    for key, tensor in before.items():
        wanted = (tensor.float() + changed[key]).half() if key in changed else tensor
        assert torch.equal(there[key], wanted), key
        assert there[key].dtype == tensor.dtype


def test_the_script_runs_tools_as_a_user_does(tmp_path):
    path, _ = of_case(tmp_path, "LoRA")
    out = tmp_path / "out.safetensors"
    done = script(["resize", str(path), str(out), "--rank", "2"])
    assert (done.returncode, done.stderr) == (0, "")
    assert out.is_file()
    assert json.loads(metadata_of(out)["ss_tag_frequency"])
