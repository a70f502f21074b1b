"""Folders that the tools read and write: with links, with other programs' weights, and when a rename fails."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.project import BASE
from helpers.tool_cases import WEIGHTS, of_case, run, unet_weights
from safetensors.torch import load_file, save_file

from common.atomic import WriteError, new_folder


def filled(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(name)
    return folder


def replace(path: Path) -> None:
    with new_folder(path) as beside:
        (beside / "new").write_text("new")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    path, rename = filled(tmp_path / "out", "old"), Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WriteError, match="out could not be written: no"):
        replace(path)
    assert names(path) == {"old"}
    assert names(tmp_path) == {"out"}


def test_the_target_of_a_link_is_replaced(tmp_path):
    filled(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    replace(tmp_path / "link")
    assert os.readlink(tmp_path / "link") == "real"
    assert names(tmp_path / "real") == {"new"}
    assert names(tmp_path) == {"real", "link"}


def test_the_current_folder_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(filled(tmp_path / "here", "old"))
    replace(Path("."))
    assert names(tmp_path / "here") == {"new"}
    assert names(tmp_path) == {"here"}


# merge


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(BASE, tmp_path / "base")


def with_weights(source: Path, change) -> Path:
    path = source / "unet" / WEIGHTS
    save_file(change(load_file(path)), path, {"format": "pt"})
    return source


def files(folder: Path) -> set[Path]:
    return {
        Path(at, name).relative_to(folder)
        for at, _, there in os.walk(folder, followlinks=True)
        for name in there
    }


@pytest.mark.parametrize("parts", [["vae"], ["unet", "text_encoder"]])
def test_components_that_are_links_are_merged_and_copied(parts, source, lora_file, tmp_path):
    for part in parts:
        (source / part).rename(tmp_path / part)
        (source / part).symlink_to(tmp_path / part)
    (source / "vae" / "around").symlink_to(source)
    (source / "scheduler" / "above").symlink_to(tmp_path)
    assert run("merge", source, tmp_path / "out", "--lora", lora_file) == 0
    assert files(tmp_path / "out") == files(BASE)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    StableDiffusionPipeline.from_pretrained(
        tmp_path / "out", safety_checker=None, feature_extractor=None
    )


def test_links_to_each_other_are_followed_once(source, lora_file, tmp_path):
    (tmp_path / "more").mkdir()
    (source / "there").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(source)
    assert run("merge", source, tmp_path / "out", "--lora", lora_file) == 0
    assert files(tmp_path / "out") == files(BASE)


def test_a_broken_link_is_an_error(source, lora_file, tmp_path, capsys):
    (source / "vae" / "config.json").unlink()
    (source / "vae" / "config.json").symlink_to(tmp_path / "gone.json")
    assert run("merge", source, tmp_path / "out", "--lora", lora_file) == 2
    assert "vae/config.json: is a link to a file that does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_component_that_cannot_be_copied_is_an_error(source, lora_file, tmp_path, capsys):
    shutil.rmtree(source / "vae")
    (source / "vae").symlink_to(source)
    assert run("merge", source, tmp_path / "out", "--lora", lora_file) == 1
    assert "vae would be missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_copies_no_foreign_weights(source, lora_file, tmp_path, capsys):
    foreign = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
               "v1-5-pruned.safetensors", "v1-5-pruned-emaonly.ckpt"]  # fmt: skip
    for name in foreign:
        (source / name).write_bytes(b"other")
    index = "unet/diffusion_pytorch_model.fp16.safetensors.index.json"
    (source / index).write_text('{"weight_map": {"a": "b"}}')
    (source / "README.md").write_text("kept")
    assert run("merge", source, tmp_path / "out", "--lora", lora_file) == 0
    said = capsys.readouterr().out
    assert [name for name in (*foreign, index) if name not in said] == []
    assert files(tmp_path / "out") == files(BASE) | {Path("README.md")}


@pytest.mark.parametrize("text", ["{", "[]", "\x80"])
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors.index.json"])
def test_a_broken_list_of_shards_is_named(name, text, source, lora_file, tmp_path, capsys):
    (source / name).write_bytes(text.encode("latin1"))
    assert run("merge", source, tmp_path / "out", "--lora", lora_file) == 2
    assert f"{name} is not readable as JSON" in capsys.readouterr().err


def test_out_may_be_a_link_or_the_current_folder(source, lora_file, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(source)
    for name, here in (("link", tmp_path), (".", source)):
        filled(source, "old")
        monkeypatch.chdir(here)
        assert run("merge", BASE, name, "--lora", lora_file, "--overwrite") == 0
        assert files(source) == files(BASE)
    assert names(tmp_path) == {"base", "link", lora_file.name}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_merge_into_fp8(dtype, source, lora_file, tmp_path, capsys):
    with_weights(
        source, lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()}
    )
    assert run("merge", source, tmp_path / "out", "--lora", lora_file) == 0
    assert {tensor.dtype for tensor in unet_weights(tmp_path / "out").values()} == {dtype}
    assert run("merge", source, tmp_path / "more", "--lora", f"{lora_file}:1e8") == 1
    assert "too large for" in capsys.readouterr().err


def test_merge_names_values_that_are_not_finite(source, lora_file, tmp_path, capsys):
    assert run("merge", source, tmp_path / "out", "--lora", f"{lora_file}:1e39") == 1
    assert "the updates of the adapters are not finite" in capsys.readouterr().err
    with_weights(
        source, lambda weights: {**weights, "conv_in.weight": weights["conv_in.weight"] * torch.nan}
    )
    assert run("merge", source, tmp_path / "out", "--lora", lora_file) == 2
    assert (
        "conv_in.weight: not finite (NaN or infinite values) in the model"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("case", ["DoRA", "OFT", "GLoRA"])
def test_an_update_of_a_model_that_is_not_finite_is_named(case, source, tmp_path, capsys):
    path, fault = (
        of_case(tmp_path, case)[0],
        "conv_in: the model's weight is not finite (NaN or infinite values)",
    )
    with_weights(
        source, lambda weights: {**weights, "conv_in.weight": weights["conv_in.weight"] * torch.nan}
    )
    assert run("inspect", path, "--model", source) == 1
    said = capsys.readouterr().out
    assert fault in said
    assert "needs --model" not in said
    assert run("resize", path, tmp_path / "out.safetensors", "--rank", 2, "--model", source) == 2
    assert fault in capsys.readouterr().err


TO_Q = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
BIASES = {
    "too short": ("conv_in", 3, "diff_b is (3,) and should be (56,)"),
    "of one": ("conv_in", 1, "diff_b is (1,) and should be (56,)"),
    "without a place": (TO_Q, 128, "diff_b is (128,), and the layer has no bias"),
}


@pytest.mark.parametrize("case", BIASES)
def test_a_bias_that_does_not_fit_is_named(case, lora_file, tmp_path, capsys):
    layer, size, fault = BIASES[case]
    save_file({**load_file(lora_file), f"lora_unet_{layer}.diff_b": torch.ones(size)}, lora_file)
    assert run("merge", BASE, tmp_path / "out", "--lora", lora_file) == 2
    assert (
        run(
            "convert", lora_file, tmp_path / "out.safetensors", "--format", "kohya", "--model", BASE
        )
        == 2
    )
    assert capsys.readouterr().err.count(fault) == 2
    assert run("inspect", lora_file, "--model", BASE) == 1
    assert fault in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
