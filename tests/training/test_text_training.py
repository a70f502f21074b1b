"""Training CLIP text encoders with the denoiser: the same conditioning, in every step, and files that load."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.family_cases import cases, folder_of
from helpers.project import BASE
from safetensors.torch import load_file

from common.errors import ModelError
from models.base import cond_bytes
from models.config import ModelConfig
from models.detect import get_family

CAPTIONS = ["a smiling cat, 3d style", "", "a " * 30 + "dog"]
MODELS = {
    "sd15": (lambda: BASE, StableDiffusionPipeline),
    "sdxl": (
        lambda: next(folder_of(case) for case in cases() if case.family == "sdxl"),
        StableDiffusionXLPipeline,
    ),
}
BOTH = pytest.mark.parametrize("name", MODELS)


def families(name: str) -> tuple:
    path = str(MODELS[name][0]())
    return get_family(ModelConfig(path=path)), get_family(
        ModelConfig(path=path, train_text_encoder=True)
    )


@BOTH
def test_encoded_in_the_loop_is_what_is_encoded_before(name):
    plain, trained = families(name)
    with torch.no_grad():
        expected = plain.encode_prompt(plain.load_encoders("text"), CAPTIONS)
        rows = trained.encode_prompt(trained.load_encoders("text"), CAPTIONS)
        tokens = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        found = trained.encode_tokens(trained.load_denoiser(torch.float32), tokens)
    for key, tensor in expected[0].items():
        torch.testing.assert_close(found[key], torch.stack([row[key] for row in expected]))
        assert tensor.shape == found[key].shape[1:]
    assert sum(tensor.nbytes for tensor in rows[0].values()) == cond_bytes(trained)


@BOTH
@pytest.mark.parametrize("preset", ["attention", "attention-mlp", "all"])
def test_presets_take_the_same_layers_of_the_denoiser_and_those_of_the_encoders(name, preset):
    import re

    plain, trained = families(name)

    def matched(family) -> set[str]:
        return {
            n
            for n, _ in family.empty_denoiser().named_modules()
            if re.fullmatch(family.targets[preset], n)
        }

    more = matched(trained) - matched(plain)
    assert matched(plain) <= matched(trained)
    layers = {"attention": 4, "attention-mlp": 6, "all": 6}[preset]
    counts = {
        "sd15": [trained.component_config("text_encoder")["num_hidden_layers"]],
        "sdxl": [2, 3],
    }[name]
    assert len(more) == layers * sum(counts)
    assert all(n.startswith("text_encoder") for n in more)


def arguments(name: str, options: list[str], *more: str) -> list[str]:
    """Options of a run on that model that trains everything."""
    mine = [
        option for option in options if not option.startswith(("--model.path", "--data.resolution"))
    ]
    return [*mine, f"--model.path={MODELS[name][0]()}", "--data.resolution=32", "--model.train_text_encoder",
            "--learning_rate=1e-2", "--adapter.alpha=4", *more]  # fmt: skip


@BOTH
def test_a_run_trains_the_encoders_and_diffusers_draws_what_it_drew(
    name, options, run_here, tmp_path, monkeypatch
):
    from training.sampling import renderer

    kept = {}
    original = renderer.SampleRenderer.render

    def keep(self, weight_sets):
        drawn = original(self, weight_sets)
        kept.update({label: np.concatenate(images) for label, images in drawn.images.items()})
        kept["prompts"] = [prompt.text for prompt in drawn.prompts]
        return drawn

    monkeypatch.setattr(renderer.SampleRenderer, "render", keep)
    previews = [
        "--preview",
        "--sample.num_inference_steps=3",
        "--sample.guidance_scale=3",
        "--export.merged_model",
    ]
    assert run_here(arguments(name, options, *previews)) == 0
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    for prefix in {"sd15": ["lora_te_"], "sdxl": ["lora_te1_", "lora_te2_"]}[name]:
        ups = [
            t
            for key, t in tensors.items()
            if key.startswith(f"{prefix}text_model_encoder") and "lora_up" in key
        ]
        assert ups
        assert all(up.any() for up in ups)
    merged = MODELS[name][1].from_pretrained(
        tmp_path / "out" / "model_with_lora", dtype=torch.float32, safety_checker=None
    )
    loaded = MODELS[name][1].from_pretrained(
        MODELS[name][0](), dtype=torch.float32, safety_checker=None
    )
    for pipeline, tolerance in ((loaded, 1e-4), (merged, 0.02)):
        if pipeline is loaded:
            pipeline.load_lora_weights(tmp_path / "out" / "lora.safetensors")
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(
            kept["prompts"][0], height=32, width=32, num_inference_steps=3, guidance_scale=3.0, output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        assert abs(image - kept["after"][0]).max() <= tolerance
    assert abs(kept["before"] - kept["after"]).max() > 0.05


@BOTH
@pytest.mark.parametrize("algorithm", ["LoRA", "LoKr", "OFT"])
def test_a_run_goes_on_from_the_file(name, algorithm, options, run_here, tmp_path, capsys):
    first = arguments(name, options, f"--algorithm={algorithm}")
    assert run_here(first) == 0
    file = f"--existing_lora={tmp_path / 'out' / 'lora.safetensors'}"
    assert run_here([*first, file, f"--output_dir={tmp_path / 'more'}"]) == 0
    capsys.readouterr()
    without = [option for option in first if option != "--model.train_text_encoder"]
    assert run_here([*without, file, f"--output_dir={tmp_path / 'less'}"]) == 2
    assert "--model.train_text_encoder" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [["--adapter.train_norms"], ["--adapter.targets", r".*attn.*"]])
def test_layers_that_nothing_is_read_from_are_not_waited_for(
    targets, options, run_here, monkeypatch
):
    """Of SDXL's first encoder the last layer: on several ranks DDP would look for its gradients in vain."""
    from training.distributed.engine import Engine

    found = []
    update = Engine.update

    def watched(self, learning_rate):
        found.append(
            [
                name
                for name, p in self.denoiser.named_parameters()
                if p.requires_grad and p.grad is None
            ]
        )
        return update(self, learning_rate)

    monkeypatch.setattr(Engine, "update", watched)
    assert run_here(arguments("sdxl", options, *targets, "--steps=2")) == 0
    assert found == [[], []]


def test_a_file_without_text_encoders_is_not_one_to_train_them_with(
    options, run_here, tmp_path, capsys
):
    plain = [
        option
        for option in arguments("sd15", options, "--steps=1")
        if option != "--model.train_text_encoder"
    ]
    assert run_here(plain) == 0
    file = f"--existing_lora={tmp_path / 'out' / 'lora.safetensors'}"
    assert (
        run_here([*plain, file, "--model.train_text_encoder", f"--output_dir={tmp_path / 'more'}"])
        == 2
    )
    assert "no layer of a text encoder is adapted" in capsys.readouterr().err


def test_what_pefts_folders_cannot_hold_is_refused_before_training(
    options, run_here, tmp_path, capsys
):
    assert run_here(arguments("sd15", options, "--export.formats=peft")) == 2
    assert "a folder of PEFT holds the adapter of one model" in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_encoders_have_a_learning_rate_of_their_own(options, run_here, tmp_path, capsys):
    """So small a one that nothing of theirs changes, while the denoiser trains."""
    rates = ["--optim.text_encoder_learning_rate=1e-12", "--learning_rate=1e-2"]
    assert run_here(arguments("sd15", options, *rates)) == 0
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    sizes = {"lora_te": 0.0, "lora_unet": 0.0}
    for key, tensor in tensors.items():
        if "lora_up" in key:
            start = next(start for start in sizes if key.startswith(start))
            sizes[start] = max(sizes[start], float(tensor.abs().max()))
    assert sizes["lora_te"] < 1e-9
    assert sizes["lora_unet"] > 1e-3
    plain = [
        option
        for option in arguments("sd15", options, *rates)
        if option != "--model.train_text_encoder"
    ]
    assert run_here(plain) == 2
    assert "text_encoder_learning_rate: has no effect without" in capsys.readouterr().err


def test_what_has_no_captions_is_refused():
    family = families("sd15")[1]
    with pytest.raises(ModelError, match="train_text_encoder"):
        family.comfy.read(torch.zeros(1, 77, 768), {})
    with pytest.raises(ModelError, match="train_text_encoder"):
        family.comfy.write({})
