"""The assistant LoRA: training is that on a base with the LoRA merged, samples and files are without it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.family_cases import cases, folder_of
from helpers.project import BASE
from helpers.runs import assert_same_result, result_of
from safetensors.torch import load_file, save_file

from adapter_files.spellings import layer_spellings
from common.errors import AdapterError
from models.config import ModelConfig
from models.detect import get_family
from training.assistant import (
    AssistedLayer,
    assistant_at_strength,
    attach_assistant,
    distillation_notes,
    lora_of,
    read_assistant,
)
from training.cli import load_config

STRONG = ["--steps=3", "--learning_rate=3e-2", "--adapter.targets=all", "--export.merged_model"]
REPOSITORY = "models--owner--adapters"
COMMIT = "0" * 40


@pytest.fixture
def trained(run_into) -> Path:
    """The folder of a run whose LoRA of all layers, also convolutions, changes the model a lot."""
    return run_into("assistant", *STRONG)


@pytest.fixture
def assistant(trained) -> str:
    return f"--model.assistant_lora={trained / 'lora.safetensors'}"


@pytest.mark.parametrize("algorithm", ["LoRA", "OFT"])
def test_losses_are_those_on_the_merged_base(algorithm, run_into, trained, assistant):
    """OFT turns the weights without the assistant, so its losses are not those of the merged base.

    The merged weights are rounded to fp16."""
    more = [
        f"--algorithm={algorithm}",
        "--steps=3",
        "--learning_rate=1e-3",
        "--adapter.targets=all",
    ]
    plain = run_into("plain", *more)
    assisted = run_into("assisted", *more, assistant)
    merged = run_into("merged", *more, f"--model.path={trained / 'model_with_lora'}")
    (losses, adapter), (expected, _) = result_of(assisted), result_of(merged)
    assert losses[0] == pytest.approx(expected[0], rel=2e-4)
    assert losses[0] != pytest.approx(result_of(plain)[0][0], rel=1e-2)
    if algorithm == "LoRA":
        assert losses == pytest.approx(expected, rel=2e-4)
    assert adapter.keys() == result_of(plain)[1].keys()


def test_samples_show_the_base_without_it(run_into, assistant):
    more = ["--steps=2", "--sample.every=2", "--sample.at_start", "--sample.num_inference_steps=2"]
    more += ["--sample.prompts", "a cat"]
    pictures = {}
    for name, options in {
        "plain": [],
        "assisted": [assistant],
        "half": [assistant, "--sample.assistant_strength=0.5"],
    }.items():
        folder = run_into(name, *more, *options) / "samples"
        pictures[name] = [
            (folder / f"lora-step0000000{step}_00.png").read_bytes() for step in (0, 2)
        ]
    assert pictures["assisted"][0] == pictures["plain"][0]
    assert pictures["assisted"][1] != pictures["plain"][1]
    assert pictures["half"][0] != pictures["plain"][0]


@pytest.mark.parametrize(
    "more",
    [
        ["--algorithm=DoRA", "--memory.offload_blocks=all"],
        ["--model.quantization=nf4", "--memory.offload_blocks=all"],
        ["--grad_accumulation_steps=2", "--checkpoint_depth=2"],
    ],
    ids=["offload", "quantized", "depth"],
)
def test_memory_options_change_no_bit(more, run_into, assistant):
    small_only = ("--memory", "--checkpoint_depth")
    plain = [option for option in more if not option.startswith(small_only)]
    first = run_into("plain", assistant, "--steps=3", *plain)
    second = run_into("small", assistant, "--steps=3", "--gradient_checkpointing", *more)
    assert_same_result(first, second)


def test_a_resumed_run_is_the_same_and_keeps_its_assistant(
    run_into, run_here, options, assistant, capsys
):
    whole = run_into("whole", assistant)
    parts = run_into("parts", assistant, "--steps=3")
    assert "layers, frozen and not exported" in capsys.readouterr().out
    mine = [*options, f"--output_dir={parts}"]
    assert run_here(mine) == 2
    assert "assistant_lora" in capsys.readouterr().err
    assert run_here([*mine, assistant]) == 0
    assert_same_result(whole, parts)


def test_published_files_do_not_name_its_folder(run_into, assistant, tmp_path):
    folder = run_into("out", assistant)
    data = (folder / "lora.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    config = yaml.safe_load(header["__metadata__"]["train_lora.config"])
    assert config["model"]["assistant_lora"] == ".../lora.safetensors"
    assert str(tmp_path) not in json.dumps(header)


@pytest.mark.parametrize(
    "case", [case for case in cases() if str(case) in ("flux1", "z_image")], ids=str
)
def test_transformers_and_their_exported_names(case, tmp_path):
    """A file in another spelling, here with fused weights, fits too. At strength 0 nothing is left."""
    family = get_family(ModelConfig(path=str(folder_of(case))))
    denoiser = family.load_denoiser(torch.float32)
    names = layer_spellings(family, denoiser)
    name = next(name for name, layer in denoiser.named_modules() if name.endswith("to_q"))
    layer = denoiser.get_submodule(name)
    tensors = {
        f"transformer.{name}.lora_A.weight": torch.randn(2, layer.in_features),
        f"transformer.{name}.lora_B.weight": torch.randn(layer.out_features, 2),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    path = str(tmp_path / "lora.safetensors")
    loras = read_assistant(ModelConfig(assistant_lora=path), denoiser, names)
    x = torch.randn(1, 3, layer.in_features)
    plain = layer(x)
    attach_assistant(denoiser, loras)
    assert isinstance(layer, AssistedLayer)
    down, up = tensors.values()
    torch.testing.assert_close(layer(x), plain + x @ down.T @ up.T)
    with assistant_at_strength(denoiser, 0):
        assert layer(x).equal(plain)
    assert denoiser.state_dict().keys() == family.load_denoiser(torch.float32).state_dict().keys()


BAD_FILES = {
    "unreadable": (b"no tensors", "is not readable"),
    "other keys": ({"weight": torch.ones(2)}, "is not an adapter of this model"),
    "norm": (
        {"lora_unet_conv_norm_out.w_norm": torch.ones(32)},
        "is no LoRA of a weight matrix",
    ),
    "text encoder": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)},
        "layers of text encoders. Expected a LoRA of the denoiser alone",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_does_not_fit_is_one_error(name, options, run_here, tmp_path, capsys):
    content, message = BAD_FILES[name]
    path = tmp_path / "bad.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    assert run_here([*options, f"--model.assistant_lora={path}"]) == 2
    error = capsys.readouterr().err
    assert f"--model.assistant_lora {path}" in error
    assert message in error
    assert not (tmp_path / "out" / "checkpoints").exists()


BAD_PATHS = {
    "{folder}/nowhere.safetensors": "does not exist; expected a .safetensors file",
    "{folder}/adapter.pt": "is a .pt file; expected a .safetensors file",
    "owner/adapters/v1.safetensors": "could not be downloaded from the Hub",
}


@pytest.mark.parametrize("pattern", BAD_PATHS)
def test_a_path_that_is_no_adapter(pattern, options, run_here, tmp_path, capsys):
    (tmp_path / "adapter.pt").write_bytes(b"PK")
    path, message = pattern.format(folder=tmp_path), BAD_PATHS[pattern]
    assert run_here([*options, f"--model.assistant_lora={path}"]) == 2
    error = capsys.readouterr().err
    assert f"--model.assistant_lora {path}" in error
    assert message in error


def test_a_file_of_the_hub_is_read_from_its_cache(trained, tmp_path, monkeypatch):
    """Offline: no hub can be reached in tests."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / REPOSITORY / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    references = tmp_path / "hub" / REPOSITORY / "refs"
    references.mkdir()
    (references / "main").write_text(COMMIT)
    shutil.copy(trained / "lora.safetensors", snapshot / "v1.safetensors")
    family = get_family(ModelConfig(path=str(BASE)))
    denoiser = family.empty_denoiser()
    names = layer_spellings(family, denoiser)
    paths = (str(trained / "lora.safetensors"), "owner/adapters/v1.safetensors")
    local, cached = (
        read_assistant(ModelConfig(assistant_lora=path), denoiser, names) for path in paths
    )
    assert cached.keys() == local.keys()
    assert len(load_file(trained / "lora.safetensors")) >= 3 * len(local) > 100


@pytest.mark.parametrize(
    ("name", "is_distilled"),
    [
        ("sdxl-turbo", True),
        ("Z-Image-Turbo", True),
        ("FLUX.1-schnell", True),
        ("model-4step-distilled", True),
        ("Z-Image-De-Turbo", False),
        ("flux-dev-de-distill", False),
        ("flux-dev-undistilled", False),
        ("FLUX.1-schnell-de-distilled", False),
        ("welcome-to-my-model", False),
        ("Z-Image", False),
    ],
)
def test_a_distilled_model_without_assistant_brings_a_note(name, is_distilled, tmp_path, options):
    folder = tmp_path / name
    folder.symlink_to(BASE)
    config = load_config([*options, f"--model.path={folder}"])
    family = get_family(config.model)
    assert bool(distillation_notes(config, family)) == is_distilled
    config = load_config(
        [*options, f"--model.path={folder}", "--model.assistant_lora=owner/name/file.safetensors"]
    )
    assert distillation_notes(config, family) == []


def test_a_note_names_the_model_to_train(options):
    schnell = next(case for case in cases() if "schnell" in str(case))
    config = load_config([*options, f"--model.path={folder_of(schnell)}"])
    (note,) = distillation_notes(config, get_family(config.model))
    assert "FLUX.1-dev" in note


def test_the_plan_counts_the_assistant(options, assistant, trained, capsys, run_here):
    """It is read before tensors lose their values."""
    totals: list[int] = []
    capsys.readouterr()  # of the run that made the assistant
    for more in ([], [assistant]):
        assert run_here(["plan", *options, *more, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        totals.append(plan["phases"]["train"]["base model"])
    numbers = sum(tensor.numel() for tensor in load_file(trained / "lora.safetensors").values())
    assert totals[1] - totals[0] == pytest.approx(4 * numbers, rel=0.01)


def test_another_file_of_the_same_name_does_not_go_on(run_into, run_here, options, trained, capsys):
    path = trained / "lora.safetensors"
    assistant = f"--model.assistant_lora={path}"
    folder = run_into("parts", assistant, "--steps=2")
    tensors = load_file(path)
    save_file({name: -tensor for name, tensor in tensors.items()}, path)
    assert run_here([*options, assistant, f"--output_dir={folder}"]) == 2
    assert "the file of --model.assistant_lora has changed" in capsys.readouterr().err


def test_a_strength_without_an_assistant_is_an_error(options, run_here, capsys):
    assert run_here([*options, "--sample.assistant_strength=0.5"]) == 2
    assert "has no effect without --model.assistant_lora" in capsys.readouterr().err


def test_what_is_not_a_lora_of_the_weight_is_refused():
    factors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    with pytest.raises(AdapterError, match="changes the bias"):
        lora_of({**factors, "diff_b": torch.ones(8)}, torch.nn.Linear(8, 8))
    grouped = torch.nn.Conv2d(8, 8, 1, groups=2)
    kernels = {name: tensor[..., None, None] for name, tensor in factors.items()}
    kernels["lora_down.weight"] = kernels["lora_down.weight"][:, :4]
    with pytest.raises(AdapterError, match="grouped convolution"):
        lora_of(kernels, grouped)
