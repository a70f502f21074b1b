"""The metadata of written files describes their content."""

import json

import pytest
import torch
from helpers.adapter_file_cases import SPECS, base, names
from helpers.project import BASE
from helpers.tool_cases import assert_same_updates, metadata_of, of_case, run
from safetensors.torch import load_file, save_file

from adapter_files import files
from adapter_files.reader import import_layers
from lora_algos.detection import layer_delta

STALE = {
    "ss_network_module": "networks.other", "ss_network_args": '{"algo": "other"}', "ss_network_dim": "99",
    "modelspec.hash_sha256": "0xold", "note": "kept",
}  # fmt: skip


def network_of(case: str) -> tuple[str, dict]:
    algorithm = SPECS[case].algorithm
    args = {} if algorithm == "LoRA" else {"algo": algorithm.lower()}
    return "networks.lora" if algorithm in ("LoRA", "DoRA") else "lycoris.kohya", args


@pytest.mark.parametrize(
    "case", ["LoRA", "DoRA", "LoHa", "LoKr full", "OFT constraint", "BOFT", "GLoRA", "Full"]
)
def test_convert_names_the_algorithm(case, tmp_path):
    path, adapted = of_case(tmp_path, case)
    save_file(load_file(path), path, {**metadata_of(path), **STALE})
    out = tmp_path / "out.safetensors"
    assert run("convert", path, out, "--format", "comfyui", "--model", BASE) == 0
    there = metadata_of(out)
    assert (there["ss_network_module"], json.loads(there["ss_network_args"])) == network_of(case)
    assert there["ss_network_dim"] != "99"
    assert there["note"] == "kept"
    assert "modelspec.hash_sha256" not in there
    assert_same_updates(
        out, adapted, 2e-5
    )  # read with this metadata, because the alpha of a rotation depends on it


@pytest.mark.parametrize("case", ["LoHa", "OFT constraint"])
def test_resize_and_extract_name_the_algorithm(case, tmp_path):
    path, _ = of_case(tmp_path, case)
    lora, lokr, merged = (
        tmp_path / "lora.safetensors",
        tmp_path / "lokr.safetensors",
        tmp_path / "merged",
    )
    assert run("resize", path, lora, "--rank", 3, "--model", BASE) == 0
    assert run("merge", BASE, merged, "--lora", path) == 0
    assert (
        run("extract", BASE, merged, lokr, "--algorithm", "LoKr", "--factor", 4, "--rank", 2) == 0
    )
    assert (metadata_of(lora)["ss_network_module"], metadata_of(lora)["ss_network_args"]) == (
        "networks.lora",
        "{}",
    )
    assert (metadata_of(lokr)["ss_network_module"], metadata_of(lokr)["ss_network_args"]) == (
        "lycoris.kohya",
        '{"algo": "lokr"}',
    )


@pytest.mark.parametrize("module", ["networks.oft", "lycoris.kohya"])
def test_a_constraint_becomes_part_of_the_blocks(module, tmp_path):
    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    blocks = torch.randn(7, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor(0.5 if module == "networks.oft" else 0.5 / 56)  # LyCORIS' is per channel
    save_file({"lora_unet_conv_in.oft_blocks": blocks, "lora_unet_conv_in.alpha": alpha}, path,
              {"ss_network_module": module})  # fmt: skip
    assert run("convert", path, out, "--format", "kohya", "--model", BASE) == 0
    layers, _ = import_layers(*files.read_adapter(out), base(), names())
    assert float(layers["conv_in"]["alpha"]) == 0
    turned = layers["conv_in"]["oft_blocks"]
    assert float((turned - turned.mT).norm()) == pytest.approx(0.5, rel=1e-5)
    whole = import_layers(*files.read_adapter(path), base(), names())[0]
    weight = base().conv_in.weight.detach()
    there, here = (layer_delta(x["conv_in"], weight) for x in (layers, whole))
    assert (there - here).norm() < 1e-5 * here.norm()
