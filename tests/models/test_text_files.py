"""Text encoders in files of their own, as ComfyUI's `text_encoders/` has them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.family_cases import Case, cases, folder_of, native_tensors
from helpers.ldm import vae_name, vae_tensor
from helpers.text_files import assert_same_rows, bare, encoders_of, text_files
from safetensors.torch import load_file, save_file

from common.errors import ConfigError, ModelError
from common.hashing import hash_of_files
from models.base import cond_bytes
from models.config import ModelConfig
from models.detect import get_family
from training.cli import load_config

CASES = {str(case): case for case in cases()}
FLUX, SDXL, SD3 = CASES["flux1-dev"], CASES["sdxl"], CASES["sd3"]


def split(case: Case, folder: Path) -> dict[str, Any]:
    """The case's model as ComfyUI's files, and its folder without any weights; options of the model section."""
    files = text_files(case, folder)
    vae = get_family(ModelConfig(path=str(folder_of(case)))).load_encoders("media").vae
    levels = len(vae.config.block_out_channels)
    named = {
        vae_name(name, levels): vae_tensor(name, t).contiguous()
        for name, t in vae.state_dict().items()
    }
    save_file(named, folder / "ae.safetensors")
    save_file(native_tensors(case, "model.diffusion_model."), folder / "model.safetensors")
    return {
        "path": str(folder / "model.safetensors"), "vae": str(folder / "ae.safetensors"),
        "config": str(bare(case, folder / "configs", "*")), "text_encoders": tuple(files.values()),
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_files_encode_as_the_folder_does_whatever_the_family(case, tmp_path):
    files = text_files(case, tmp_path)
    folder = bare(case, tmp_path / "bare", "text_encoder*")
    family = get_family(
        ModelConfig(path=str(folder), text_encoders=tuple(files.values()), **case.model)
    )
    assert_same_rows(family, get_family(ModelConfig(path=str(folder_of(case)), **case.model)))
    assert cond_bytes(family) > 0


@pytest.mark.parametrize("case", [FLUX, SDXL], ids=str)
def test_a_model_in_comfyuis_files_is_the_folders_and_trains(
    case, tmp_path, options, run_here, capfd
):
    (tmp_path / "model").mkdir()
    model = split(case, tmp_path / "model")
    family, expected = (
        get_family(ModelConfig(**model)),
        get_family(ModelConfig(path=str(folder_of(case)))),
    )
    assert_same_rows(family, expected)
    found, wanted = family.pipeline(None), expected.pipeline(None)
    for name in ("vae", family.denoiser_component, *encoders_of(case)):
        states = getattr(found, name).state_dict(), getattr(wanted, name).state_dict()
        assert all(tensor.equal(states[0][key]) for key, tensor in states[1].items()), name
    mine = [
        option for option in options if not option.startswith(("--model.path", "--data.resolution"))
    ]
    flags = [f"--model.{name}={value}" for name, value in model.items() if name != "text_encoders"]
    given = [
        "--data.resolution=32",
        "--model.text_encoders",
        *model["text_encoders"],
        "--preview",
        "--steps=2",
    ]
    assert run_here([*mine, *flags, *given, "--sample.num_inference_steps=1"]) == 0
    assert (tmp_path / "out" / "preview.png").is_file()
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_the_others_come_from_the_folder_and_the_file_is_part_of_what_captions_are_known_by(
    tmp_path,
):
    folder, source = str(folder_of(SD3)), get_family(ModelConfig(path=str(folder_of(SD3))))
    t5 = text_files(SD3, tmp_path)["text_encoder_3"]
    changed = load_file(t5)
    changed["shared.weight"] += 1

    def identity() -> str:
        family = get_family(ModelConfig(path=folder, text_encoders=(t5,)))
        files = family.identity_files("text")
        assert Path(t5) in files
        assert folder_of(SD3) / "text_encoder_3" / "config.json" in files
        assert folder_of(SD3) / "text_encoder_2" / "model.safetensors" in files
        assert folder_of(SD3) / "text_encoder_3" / "model.safetensors" not in files
        assert {f for f in source.identity_files("text") if "tokenizer" in f.parent.name} <= {
            *files
        }
        return hash_of_files(files, tmp_path / "cache")

    before = identity()
    save_file(changed, t5)
    assert identity() != before
    found = get_family(ModelConfig(path=folder, text_encoders=(t5,))).load_encoders("text")
    assert found.text_encoder_3.shared.weight.equal(changed["shared.weight"])


def test_a_file_counts_more_than_the_encoder_in_a_checkpoint(tmp_path):
    t5 = text_files(SD3, tmp_path)["text_encoder_3"]
    tensors = load_file(t5)
    prefix = "text_encoders.t5xxl.transformer."
    inside = {
        prefix + name: tensor + 1 for name, tensor in tensors.items() if tensor.is_floating_point()
    }
    path = tmp_path / "model.safetensors"
    save_file({**native_tensors(SD3, "model.diffusion_model."), **inside}, path)
    family = get_family(
        ModelConfig(path=str(path), config=str(folder_of(SD3)), text_encoders=(t5,))
    )
    assert family.load_encoders("text").text_encoder_3.shared.weight.equal(tensors["shared.weight"])
    assert path not in family.identity_files("text")


def test_a_projection_is_read_as_older_files_have_it(tmp_path):
    files = text_files(SD3, tmp_path)
    tensors = load_file(files["text_encoder"])
    projection = torch.randn(*tensors.pop("text_projection.weight").shape)
    save_file({**tensors, "text_projection": projection}, files["text_encoder"])
    folder = str(folder_of(SD3))
    family = get_family(ModelConfig(path=folder, text_encoders=(files["text_encoder"],)))
    assert family.load_encoders("text").text_encoder.text_projection.weight.equal(projection.T)
    save_file(tensors, files["text_encoder"])
    with pytest.raises(
        ModelError, match=r"text_encoder\.safetensors: lacks 1 tensors .*text_projection.weight"
    ):
        family.load_encoders("text")


def test_encoders_that_are_trained_are_those_in_the_files(tmp_path):
    files = tuple(text_files(SDXL, tmp_path).values())
    changed = load_file(files[0])
    changed["text_model.final_layer_norm.bias"] += 1
    save_file(changed, files[0])
    config = ModelConfig(path=str(folder_of(SDXL)), text_encoders=files, train_text_encoder=True)
    family = get_family(config)
    denoiser = family.load_denoiser(torch.float32)
    assert denoiser.text_encoder.final_layer_norm.bias.equal(
        changed["text_model.final_layer_norm.bias"]
    )
    assert {Path(file) for file in files} <= {*family.identity_files("denoiser")}, (
        "the base's hash is of them too"
    )


def test_plain_fp8_is_widened(tmp_path):
    t5 = text_files(FLUX, tmp_path)["text_encoder_2"]
    stored = {
        n: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t
        for n, t in load_file(t5).items()
    }
    save_file(stored, t5)
    found = get_family(ModelConfig(path=str(folder_of(FLUX)), text_encoders=(t5,))).load_encoders(
        "text"
    )
    assert found.text_encoder_2.shared.weight.equal(stored["shared.weight"].float())


def test_the_errors_of_all_files_are_listed_at_once(tmp_path):
    files = text_files(FLUX, tmp_path)
    twin, short, rotated, broken, vae = (
        str(tmp_path / f"{n}.safetensors") for n in ("twin", "short", "rotated", "no", "vae")
    )
    shutil.copy(files["text_encoder"], twin)
    tensors = load_file(files["text_encoder_2"])
    save_file({name: tensor for name, tensor in tensors.items() if "block.1." not in name}, short)
    marker = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file({**tensors, "encoder.block.0.layer.0.SelfAttention.k.comfy_quant": marker}, rotated)
    Path(broken).write_text("nothing")
    save_file({"decoder.conv_in.weight": torch.zeros(1)}, vae)
    given = (files["text_encoder"], twin, short, rotated, broken, vae)
    with pytest.raises(ModelError) as caught:
        get_family(ModelConfig(path=str(folder_of(FLUX)), text_encoders=given))
    said = str(caught.value).splitlines()
    layers = json.loads((folder_of(FLUX) / "text_encoder_2" / "config.json").read_text())[
        "num_layers"
    ]
    assert [line.strip().split(": ")[0] for line in said[1:]] == list(given[1:])
    assert f"is text_encoder, like {files['text_encoder']}. Use one file" in said[1]
    assert f"{layers - 1} layers; expected text_encoder (CLIP of" in said[2]
    assert (
        f"or text_encoder_2 (T5 of {len(tensors['shared.weight'])} tokens x 32, {layers} layers"
        in said[2]
    )
    assert f"{rotated}: has weights in nvfp4; expected" in said[3]
    assert "not a readable .safetensors file" in said[4]
    assert "named like decoder.conv_in.weight" in said[5]


def test_names_that_cannot_be_text_encoders_are_refused_before_anything_loads(tmp_path, options):
    pickled = tmp_path / "t5xxl.bin"
    pickled.touch()
    with pytest.raises(ConfigError) as caught:
        load_config(
            [*options, "--model.text_encoders", str(pickled), "nope.safetensors", str(tmp_path)]
        )
    said = str(caught.value)
    expected = "expected .safetensors or .gguf files"
    assert f"--model.text_encoders {pickled}: is a .bin file; {expected}" in said
    assert "--model.text_encoders nope.safetensors: does not exist" in said
    assert f"--model.text_encoders {tmp_path}: is a folder; {expected}" in said
