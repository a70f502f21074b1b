"""Files of the tools: a model without its weights, and the messages for wrong input."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapter_file_cases import on_layers
from helpers.project import BASE, PROJECT, script
from helpers.tool_cases import base_file, of_case, run
from safetensors.torch import load_file, save_file

from models.config import ModelConfig
from tools.base_model import BaseModel
from tools.options import OPTIONS


@pytest.mark.parametrize("single", [False, True])
def test_a_model_is_opened_without_its_weights(single, tmp_path):
    config = (
        ModelConfig(str(base_file(tmp_path / "a.safetensors")), config=str(BASE))
        if single
        else ModelConfig(str(BASE))
    )
    model = BaseModel(config)
    assert {p.device.type for p in model.skeleton.parameters()} == {"meta"}
    whole = model.family.load_denoiser(torch.float32).state_dict()
    assert model.file_keys.keys() == whole.keys()
    for name, tensor in whole.items():
        layer, suffix = name.rsplit(".", 1)
        assert torch.equal(model.parameter(layer, suffix), tensor), name


# wrong input


def command(name: str, path: Path, out: Path, model: Path = BASE) -> list:
    return {
        "inspect": ["inspect", path, "--model", model],
        "convert": ["convert", path, out, "--format", "kohya", "--model", model],
        "resize": ["resize", path, out, "--rank", 2, "--model", model],
        "merge": ["merge", model, out, "--lora", path],
        "extract": ["extract", model, path, out, "--algorithm", "Full"],
    }[name]


def damaged(kind: str, good: Path) -> Path:
    path = good.with_name(f"{kind}.safetensors")
    data = good.read_bytes()
    if kind == "pickle":
        torch.save({"a": torch.ones(1)}, path)
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("a picture of a cat, with more than eight letters")
    elif kind in ("nan", "foreign", "shape"):
        tensors = load_file(good)
        key = next(key for key in tensors if key.endswith("lora_up.weight"))
        if kind == "nan":
            tensors[key][0, 0] = float("nan")
        if kind == "shape":
            tensors[key] = torch.ones(7, 4)
        if kind == "foreign":
            tensors = {
                f"transformer.single_transformer_blocks.{i}.attn.to_q.lora_A.weight": torch.ones(
                    4, 8
                )
                for i in (1, 2)
            }
        save_file(tensors, path)
    return path


SAYS = {
    "missing": "does not exist",
    "pickle": "pickle",
    "truncated": "cut short",
    "empty": "not a readable",
    "text": "not a readable",
    "nan": "not finite",
    "shape": "should be",
    "foreign": "FLUX",
}


@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize("name", ["inspect", "convert", "resize", "merge"])
def test_a_bad_adapter_is_named_and_nothing_is_left_behind(name, kind, lora_file, tmp_path, capsys):
    path = damaged(kind, lora_file)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / ("out" if name == "merge" else "out.safetensors")
    code = run(*command(name, path, out))
    said = capsys.readouterr()
    assert code == (1 if name == "inspect" and kind in ("nan", "shape", "foreign") else 2)
    assert SAYS[kind] in said.err + said.out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["missing", "pickle", "truncated", "text"])
@pytest.mark.parametrize("name", ["convert", "merge", "extract"])
def test_a_bad_model_is_named_and_nothing_is_left_behind(name, kind, lora_file, tmp_path, capsys):
    model = damaged(kind, base_file(tmp_path / "base.safetensors"))
    before = sorted(tmp_path.iterdir())
    words = command(name, lora_file, tmp_path / "out.safetensors", model)
    words[2:3] = [BASE] if name == "extract" else words[2:3]
    assert run(*words, "--config", BASE) == 2
    assert model.name in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_an_incomplete_model_is_an_error(lora_file, tmp_path, capsys):
    path = base_file(tmp_path / "base.safetensors")
    tensors = load_file(path)
    del tensors["model.diffusion_model.out.2.weight"]
    save_file(tensors, path)
    assert (
        run("merge", path, tmp_path / "out.safetensors", "--lora", lora_file, "--config", BASE) == 2
    )
    assert "model.diffusion_model.out.2.weight: missing" in capsys.readouterr().err


def test_nothing_is_overwritten_without_the_option(lora_file, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    assert run(*command("convert", lora_file, out)) == 2
    assert "already exists. Choose another path, or add --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run(*command("convert", lora_file, out), "--overwrite") == 0
    before = lora_file.read_bytes()
    assert run(*command("convert", lora_file, lora_file), "--overwrite") == 2
    assert lora_file.read_bytes() == before
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "me.png").write_text("mine")
    assert run(*command("merge", lora_file, folder), "--overwrite") == 2
    assert run(*command("merge", lora_file, BASE), "--overwrite") == 2
    assert run(*command("merge", lora_file, BASE / "unet" / "out"), "--overwrite") == 2
    assert (folder / "me.png").read_text() == "mine"


def test_all_errors_are_reported_at_once(tmp_path, capsys):
    words = [
        "--format",
        "kohya",
        "--model",
        "no/such/model",
        "--convert",
        "lora-svd",
        "--drop",
        "(",
    ]
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "b.txt", *words) == 2
    said = capsys.readouterr().err
    for fault in (
        "convert: 5 errors",
        "a.safetensors: does not exist",
        "no/such/model",
        "--rank",
        "--drop (",
        "b.txt",
    ):
        assert fault in said
    assert run("merge", BASE, tmp_path / "out", "--lora", "nowhere.safetensors:much") == 2
    assert run("resize", tmp_path, tmp_path / "b.safetensors", "--rank", 0, "--energy", 2) == 2
    assert "resize: 5 errors" in capsys.readouterr().err


def test_layers_that_a_format_cannot_hold_are_an_error(tmp_path, capsys):
    path, _ = of_case(tmp_path, "OFT")
    before = sorted(tmp_path.iterdir())
    assert (
        run("convert", path, tmp_path / "out.safetensors", "--format", "diffusers", "--model", BASE)
        == 2
    )
    assert run("resize", path, tmp_path / "out.safetensors", "--rank", 4) == 2
    said = capsys.readouterr().err
    assert "OFT needs --model" in said
    assert "--format diffusers only holds LoRA, DoRA" in said
    assert sorted(tmp_path.iterdir()) == before


def test_values_too_large_for_fp16_are_an_error(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    stem = "lora_unet_conv_in"
    shape = on_layers("LoRA", ["conv_in"]).layers()["conv_in"].base_layer.weight.shape
    down = torch.full((1, *shape[1:]), 1e5)
    save_file(
        {f"{stem}.lora_up.weight": torch.ones(shape[0], 1, 1, 1), f"{stem}.lora_down.weight": down},
        path,
    )
    assert run("resize", path, tmp_path / "out.safetensors", "--rank", 1, "--dtype", "fp16") == 0
    assert (
        run(
            "convert",
            path,
            tmp_path / "b.safetensors",
            "--format",
            "kohya",
            "--dtype",
            "fp16",
            "--model",
            BASE,
        )
        == 1
    )
    assert run("merge", BASE, tmp_path / "merged", "--lora", path) == 1
    assert capsys.readouterr().err.count("too large for") == 2
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "out.safetensors"}


def test_the_same_model_twice_has_no_difference(tmp_path, capsys):
    assert run("extract", BASE, BASE, tmp_path / "out.safetensors", "--algorithm", "Full") == 1
    assert "nothing to write" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "inspect": ["no.safetensors"],
    "convert": ["no.safetensors", "/no/out.safetensors", "--format=kohya", "--model=none"],
    "merge": ["no.safetensors", "/no/out.safetensors"],
    "resize": ["no.safetensors", "/no/out.safetensors"],
    "extract": ["no.safetensors", "no.safetensors", "/no/out.safetensors", "--algorithm=Full"],
}


BYTES, LAYER = "adapter_files.safetensors_stream.tensor_bytes", "adapter_files.files.to_bytes"
WRITING = {"convert": BYTES, "resize": LAYER, "merge": BYTES}


@pytest.mark.parametrize(("name", "place"), WRITING.items())
def test_a_full_disk_leaves_nothing_behind(name, place, lora_file, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(place, full)
    assert (
        run(*command(name, lora_file, tmp_path / ("out" if name == "merge" else "out.safetensors")))
        == 1
    )
    assert "No space left" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_messages_name_the_flags_of_the_tools(lora_file, tmp_path, capsys):
    model = base_file(tmp_path / "base.safetensors")
    assert run("merge", model, tmp_path / "out.safetensors", "--lora", lora_file) == 2
    message = capsys.readouterr().err
    assert "set --config to a diffusers folder of the same kind of model" in message
    assert "--model." not in message


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_arguments_are_reported_before_torch_loads(name):
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import train_lora\n"
    code += f"code = train_lora.main({[name, *WRONG[name]]})\nassert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "no.safetensors" in done.stderr


def test_a_recipe_is_still_the_first_argument():
    done = script(["recipes/none.yaml"])
    assert done.returncode == 2
    assert "recipes/none.yaml is not a file" in done.stderr


def test_a_folder_is_not_merged_into_a_path_of_a_file(lora_file, tmp_path, capsys):
    assert run("merge", BASE, tmp_path / "out.safetensors", "--lora", lora_file) == 2
    assert "will be a folder, so it cannot end in .safetensors" in capsys.readouterr().err
