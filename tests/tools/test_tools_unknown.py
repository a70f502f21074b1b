"""Adapter files without their model: errors are still found, and the format is kept."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.adapter_file_cases import LAYERS
from helpers.project import BASE
from helpers.tool_cases import CASES, of_case, relative_error, run
from safetensors.torch import load_file, save_file

TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def halves(spelling: str, down: str, up: str) -> dict[str, torch.Tensor]:
    """Return a LoRA of rank 4 on a layer of a text encoder."""
    torch.manual_seed(0)
    return {
        f"{spelling}.{down}": torch.randn(4, 96) * 0.05,
        f"{spelling}.{up}": torch.randn(96, 4) * 0.05,
    }


def test_a_diffusers_file_with_a_text_encoder_keeps_its_format(tmp_path):
    path, out = of_case(tmp_path, "LoRA", "diffusers")[0], tmp_path / "out.safetensors"
    text = halves(f"text_encoder.{TEXT}", "lora_A.weight", "lora_B.weight")
    save_file({**load_file(path), **text}, path)
    assert run("resize", path, out, "--rank", 4) == 0
    before, after = load_file(path), load_file(out)
    assert before.keys() == after.keys()
    for key in (key for key in before if "lora_A" in key):
        (a, b), (c, d) = (
            [x[k].flatten(1) for k in (key.replace("lora_A", "lora_B"), key)]
            for x in (before, after)
        )
        assert relative_error(c @ d, a @ b) < 1e-5
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    pipeline.load_lora_weights(out)
    for part, count in ((pipeline.unet, len(LAYERS)), (pipeline.text_encoder, 1)):
        assert sum("lora_A" in name for name in part.state_dict()) == count


STARTS = {"kohya": "lora_unet_", "comfyui": "diffusion_model.", "diffusers": "unet."}


@pytest.mark.parametrize("model", [(), ("--model", BASE)], ids=["without", "with"])
@pytest.mark.parametrize("file_format", STARTS)
def test_resize_keeps_and_prints_the_format(file_format, model, tmp_path, capsys):
    path, out = of_case(tmp_path, "LoRA", file_format)[0], tmp_path / "out.safetensors"
    assert run("resize", path, out, "--rank", 2, *model) == 0
    assert f"wrote {out}: {file_format}," in capsys.readouterr().out
    assert load_file(out).keys() == load_file(path).keys()
    assert all(key.startswith(STARTS[file_format]) for key in load_file(out))


def test_resize_keeps_kohyas_text_encoder(tmp_path):
    path, out = of_case(tmp_path, "LoRA")[0], tmp_path / "out.safetensors"
    text = halves("lora_te_" + TEXT.replace(".", "_"), "lora_down.weight", "lora_up.weight")
    save_file({**load_file(path), **text}, path)
    assert run("resize", path, out, "--rank", 2) == 0
    assert load_file(out).keys() == load_file(path).keys() | {
        "lora_te_" + TEXT.replace(".", "_") + ".alpha"
    }


PARTS = {"LoRA": "lora_down.weight", "LoHa": "hada_w1_b", "LoKr": "lokr_w2_b", "DoRA": "lora_up.weight",
         "GLoRA": "b1.weight", "LoHa Tucker": "hada_t2", "LoKr both": "lokr_w1_b"}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_a_layer_without_one_of_its_tensors_is_damaged(case, tmp_path, capsys):
    path, _ = of_case(tmp_path, case)
    tensors = load_file(path)
    del tensors[f"lora_unet_conv_in.{PARTS[case]}"]
    save_file(tensors, path)
    assert run("inspect", path) == 1
    out = capsys.readouterr().out
    assert "lora_unet_conv_in: " in out
    assert out.count("lora_unet_conv_in: ") == 1, "no other layer is"
    assert run("resize", path, tmp_path / "out.safetensors", "--rank", 2) == 2
    assert "lora_unet_conv_in: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [case for case in CASES if case.split()[0] in ("LoHa", "LoKr", "GLoRA", "OFT")]
)
def test_a_layer_of_two_algorithms_is_damaged(other, tmp_path, capsys):
    path, second = of_case(tmp_path, "LoRA")[0], of_case(tmp_path, other)[0]
    more = {
        key: tensor
        for key, tensor in load_file(second).items()
        if "conv_in" in key and "alpha" not in key
    }
    save_file({**load_file(path), **more}, path)
    assert run("inspect", path) == 1
    assert "does not belong to the algorithm" in capsys.readouterr().out
    assert run("resize", path, tmp_path / "out.safetensors", "--rank", 2) == 2
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("blocks", [(3, 16, 8), (2, 7)], ids=str)
def test_blocks_that_are_not_rotations_are_damaged(blocks, tmp_path, capsys):
    save_file({"lora_unet_conv_in.oft_blocks": torch.ones(blocks)}, tmp_path / "a.safetensors")
    assert run("inspect", tmp_path / "a.safetensors") == 1
    assert "lora_unet_conv_in: " in capsys.readouterr().out


def test_an_update_that_is_not_finite_is_named_without_a_model(tmp_path, capsys):
    path, _ = of_case(tmp_path, "LoRA")
    tensors = {
        key: t * (1e30 if "conv_in" in key and "alpha" not in key else 1)
        for key, t in load_file(path).items()
    }
    save_file(tensors, path)
    assert run("inspect", path) == 1
    said = capsys.readouterr().out
    assert "lora_unet_conv_in: its update is not finite" in said
    assert "needs --model" not in said
