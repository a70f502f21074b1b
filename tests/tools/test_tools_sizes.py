"""`resize` and `extract`: their numbers, computed in another way."""

import pytest
import torch
from helpers.adapter_file_cases import base, names, on_layers, trained, with_norms
from helpers.project import BASE
from helpers.tool_cases import (
    CASES,
    adapter_file,
    assert_same_updates,
    base_file,
    deltas,
    metadata_of,
    of_case,
    relative_error,
    run,
    unet_weights,
)

from adapter_files import files
from adapter_files.reader import import_layers
from lora_algos.config import LayerSpec
from lora_algos.targets import adaptable_layers

# resize


@pytest.mark.parametrize("case", CASES)
def test_resize_to_full_rank_is_exact(case, tmp_path):
    path, adapted = of_case(tmp_path, case)
    out = tmp_path / "out.safetensors"
    assert run("resize", path, out, "--rank", 4096, "--model", BASE) == 0
    assert_same_updates(out, adapted, 1e-5)


@pytest.mark.parametrize("file_format", ["kohya", "comfyui", "diffusers", "peft"])
def test_resize_of_a_lora_needs_no_model(file_format, tmp_path, capsys):
    path, adapted = of_case(tmp_path, "LoRA", file_format)
    out = tmp_path / ("out" if file_format == "peft" else "out.safetensors")
    assert run("resize", path, out, "--rank", 2) == 0
    there, here = deltas(out), dict(adapted.deltas())
    for name, delta in here.items():
        values = torch.linalg.svdvals(delta.flatten(1))
        assert relative_error(there[name], delta) == pytest.approx(
            float(values[2:].norm() / values.norm()), rel=1e-3
        )
    again = tmp_path / ("again" if file_format == "peft" else "again.safetensors")
    assert run("resize", path, again, "--rank", 2, "--model", BASE) == 0
    other = deltas(again)
    assert max(relative_error(other[name], there[name]) for name in there) < 1e-5


def test_resize_by_energy_takes_the_smallest_sufficient_rank(tmp_path):
    path, adapted = of_case(tmp_path, "LoHa")
    out = tmp_path / "out.safetensors"
    assert run("resize", path, out, "--energy", 0.9, "--model", BASE) == 0
    layers, _ = import_layers(*files.read_adapter(out), base(), names())
    for name, delta in adapted.deltas():
        energies = torch.linalg.svdvals(delta.flatten(1).double()).square()
        rank = layers[name]["lora_down.weight"].shape[0]
        assert energies[:rank].sum() >= 0.9 * energies.sum() > energies[: rank - 1].sum()


# extract


def test_extract_returns_the_merged_adapter(fp32_model, tmp_path):
    adapted = trained(dict.fromkeys(list(adaptable_layers(base()))[::4], LayerSpec(4, 6.0)))
    path = adapter_file(tmp_path / "a.safetensors", adapted)
    assert run("merge", fp32_model, tmp_path / "tuned", "--lora", path) == 0
    out = tmp_path / "out.safetensors"
    assert (
        run("extract", fp32_model, tmp_path / "tuned", out, "--algorithm", "LoRA", "--rank", 4) == 0
    )
    assert_same_updates(out, adapted, 1e-5)
    assert "ss_base_model_version" in metadata_of(out)


def test_extract_across_a_folder_and_a_single_file(fp32_model, tmp_path):
    path, adapted = of_case(tmp_path, "LoRA")
    single, tuned = base_file(tmp_path / "base.safetensors"), tmp_path / "tuned.safetensors"
    assert run("merge", single, tuned, "--lora", path, "--config", BASE) == 0
    out = tmp_path / "out.safetensors"
    words = ("--algorithm", "LoRA", "--energy", 0.999999, "--config", BASE)
    assert run("extract", fp32_model, tuned, out, *words) == 0
    assert_same_updates(out, adapted, 2e-3)


def test_extract_full_is_exact_with_norms_and_biases(fp32_model, tmp_path, capsys):
    adapted = with_norms()
    path, out = adapter_file(tmp_path / "a.safetensors", adapted), tmp_path / "out.safetensors"
    assert run("merge", fp32_model, tmp_path / "tuned", "--lora", path) == 0
    assert run("extract", fp32_model, tmp_path / "tuned", out, "--algorithm", "Full") == 0
    assert run("merge", fp32_model, tmp_path / "again", "--lora", out) == 0
    there, here = unet_weights(tmp_path / "again"), unet_weights(tmp_path / "tuned")
    assert max(float((there[name] - here[name]).abs().max()) for name in here) < 1e-6
    capsys.readouterr()
    words = ("--algorithm", "LoRA", "--rank", 4, "--overwrite")
    assert run("extract", fp32_model, tmp_path / "tuned", out, *words) == 0
    left_out = capsys.readouterr().out
    assert "conv_norm_out.weight, |difference|" in left_out
    assert "conv_in.bias, |difference|" in left_out


@pytest.mark.parametrize("case", ["LoKr", "LoKr full"])
def test_extract_finds_a_kronecker_product(case, fp32_model, tmp_path):
    path, adapted = of_case(tmp_path, case)
    assert run("merge", fp32_model, tmp_path / "tuned", "--lora", path) == 0
    out = tmp_path / "out.safetensors"
    words = ("--factor", 4, "--rank", 2) if case == "LoKr" else ()
    assert run("extract", fp32_model, tmp_path / "tuned", out, "--algorithm", "LoKr", *words) == 0
    assert_same_updates(out, adapted, 1e-4)


def test_extract_of_any_difference_is_the_nearest_kronecker_product(fp32_model, tmp_path):
    path, adapted = of_case(tmp_path, "LoRA")
    assert run("merge", fp32_model, tmp_path / "tuned", "--lora", path) == 0
    out = tmp_path / "out.safetensors"
    assert run("extract", fp32_model, tmp_path / "tuned", out, "--algorithm", "LoKr") == 0
    layers, _ = import_layers(*files.read_adapter(out), base(), names())
    there = deltas(out)
    for name, delta in adapted.deltas():
        (a, c), (o, i) = layers[name]["lokr_w1"].shape, delta.shape[:2]
        blocks = torch.stack(
            [part.flatten() for row in delta.split(o // a) for part in row.split(i // c, dim=1)]
        )
        values = torch.linalg.svdvals(blocks.double())
        assert relative_error(there[name], delta) == pytest.approx(
            float(values[1:].norm() / values.norm()), rel=1e-3
        )


def test_the_metadata_of_a_resized_adapter_has_its_new_rank(tmp_path):
    path, _ = of_case(tmp_path, "LoRA")
    assert run("resize", path, tmp_path / "out.safetensors", "--rank", 3) == 0
    assert metadata_of(tmp_path / "out.safetensors")["ss_network_dim"] == "3"
    assert on_layers("LoRA").layers().keys() == deltas(tmp_path / "out.safetensors").keys()
