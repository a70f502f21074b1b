"""What a run leaves behind, loaded the way its users load it."""

import io
import socket
import weakref

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from helpers.project import BASE
from PIL import Image
from safetensors import safe_open

from training.output_config import SampleConfig
from training.reporting.history import History, ValidationSeries
from training.reporting.image_grid import grid_png
from training.reporting.loss_files import loss_png, smoothed
from training.sampling import renderer
from training.sampling.draw import draw_sample
from training.sampling.prompts import SamplePrompt

STRONG = ["--learning_rate=5e-3", "--adapter.targets=all", "--adapter.alpha=8", "--steps=10"]


def pipeline(path=BASE) -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(loaded, prompts, side, config) -> np.ndarray:
    images = []
    for number, text in enumerate(prompts):
        prompt = SamplePrompt(text).completed(number, side, config)
        options = {"prompt": text, "height": side, "width": side}
        options |= {
            "guidance_scale": config.guidance_scale,
            "num_inference_steps": config.num_inference_steps,
        }
        images.append(draw_sample(loaded, prompt, options)[0])
    return np.stack(images)


@pytest.fixture
def drawn(options, run_here, tmp_path, monkeypatch):
    """Runs a short strong training with previews; returns its before and after images, prompts and preview config."""
    kept = {}
    original = renderer.SampleRenderer.render

    def keep(self, weight_sets):
        drawn = original(self, weight_sets)
        texts = [prompt.text for prompt in drawn.prompts]
        kept.update({label: np.concatenate(images) for label, images in drawn.images.items()})
        kept["arguments"] = (texts, self.config.data.resolution, self.config.sample)
        return drawn

    monkeypatch.setattr(renderer.SampleRenderer, "render", keep)
    more = ["--preview", "--sample.num_inference_steps=4", "--export.merged_model"]
    assert run_here([*options, *STRONG, *more]) == 0
    return kept


def test_diffusers_draws_what_the_run_drew(drawn, tmp_path):
    assert np.abs(drawn["before"] - drawn["after"]).max() > 0.05, "the adapter does something"
    loaded = pipeline()
    assert np.abs(draw(loaded, *drawn["arguments"]) - drawn["before"]).max() <= 1e-4
    loaded.load_lora_weights(tmp_path / "out" / "lora.safetensors")
    assert np.abs(draw(loaded, *drawn["arguments"]) - drawn["after"]).max() <= 1e-4


def test_the_merged_model_draws_what_the_run_drew(drawn, tmp_path):
    merged = pipeline(tmp_path / "out" / "model_with_lora")
    image_error = np.abs(draw(merged, *drawn["arguments"]) - drawn["after"]).max()
    assert image_error < 0.02, "fp16, as the base is stored, rounds the merged weights"


def test_the_preview_grid_shows_the_images_under_their_labels(drawn, tmp_path):
    grid = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    first = Image.fromarray((drawn["before"][0] * 255).round().astype(np.uint8)).resize(
        (128, 128), Image.LANCZOS
    )
    assert np.array_equal(grid[8:136, 72:200], np.asarray(first))


def test_long_captions_are_cut_to_their_picture():
    images = np.zeros((2, 64, 64, 3))
    caption = "an extraordinarily-long-winded caption that goes on and on and on about a cat"
    png = grid_png({"before": images, "after": images}, [caption, ""])
    assert Image.open(io.BytesIO(png)).size == (72 + 2 * 136, 2 * 136 + 8 + 44)


@pytest.mark.parametrize("losses", [[0.5], [0.5] * 30, [0.0, 0.0], list(range(100))], ids=str)
def test_loss_png_survives_constant_and_single_losses(losses):
    history = History(1, validation_series=[ValidationSeries("", [{"step": 0, "loss": 0.5}])])
    history.add_steps([float(x) for x in losses], [1.0] * len(losses))
    assert Image.open(io.BytesIO(loss_png(history))).size == (990, 550)


def test_smoothing_has_no_start_up_bias():
    assert smoothed([2.0] * 5, 20) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 3.0], 1) == [1.0, 3.0]


def test_each_preview_has_its_own_noise_whatever_its_neighbors():
    loaded, config = pipeline(), SampleConfig(num_inference_steps=2, seed=2**64 - 1)
    pair = draw(loaded, ["cat", "cat"], 64, config)
    assert np.abs(pair[0] - pair[1]).max() > 0.1
    assert np.array_equal(draw(loaded, ["cat"], 64, config)[0], pair[0])


def test_the_largest_seed_trains(options, run_here):
    assert run_here([*options, f"--seed={2**64 - 1}", "--steps=1"]) == 0


def test_micro_losses_are_dropped_when_they_grow_too_many(monkeypatch):
    monkeypatch.setattr("training.reporting.history.MAX_MICRO_LOSSES", 6)
    history = History(2)
    history.add_steps([1.0, 3.0, 2.0, 2.0], [1.0, 1.0])
    assert (history.step_losses, history.micro_losses) == ([2.0, 2.0], [1.0, 3.0, 2.0, 2.0])
    history.add_steps([4.0, 4.0, 5.0, 5.0], [1.0, 1.0])
    assert (history.step_losses, history.micro_losses) == ([2.0, 2.0, 4.0, 5.0], [])
    history.add_steps([6.0, 6.0], [1.0])
    assert (history.step_losses, history.micro_losses) == ([2.0, 2.0, 4.0, 5.0, 6.0], [])


def test_everything_else_is_written_before_an_image_is_drawn(
    options, run_here, tmp_path, monkeypatch
):
    """A process that is killed while it draws has lost the preview alone."""

    class Killed(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Killed

    monkeypatch.setattr(renderer, "draw_sample", kill)
    with pytest.raises(Killed):
        run_here([*options, "--preview", "--steps=2", "--export.merged_model"])
    for name in ("lora.safetensors", "loss.json", "loss.png", "model_with_lora"):
        assert (tmp_path / "out" / name).exists(), name


@pytest.mark.parametrize("fault", ["size", "memory"])
def test_what_goes_wrong_in_a_preview_costs_the_preview_alone(
    fault, options, run_here, tmp_path, monkeypatch, capsys
):
    more = ["--preview", "--sample.num_inference_steps=2", "--steps=2"]
    if fault == "memory":
        assert (
            run_here(
                [
                    *options,
                    "--steps=1",
                    f"--output_dir={tmp_path / 'encoded'}",
                    "--data.resolution=60",
                ]
            )
            == 0
        )

        def out_of_memory(*args: object) -> None:
            raise torch.OutOfMemoryError("no memory for text encoders")

        monkeypatch.setattr(StableDiffusionPipeline, "to", out_of_memory)
    assert run_here([*options, *more, "--data.resolution=60"]) == 0
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert (tmp_path / "out" / "loss.json").is_file()
    assert (tmp_path / "out" / "preview.png").is_file() == (fault == "size"), (
        "sides are those of buckets"
    )
    assert ("no memory for text encoders" in capsys.readouterr().out) == (fault == "memory")


@pytest.mark.parametrize("conversion", ["lora-svd", "full"])
def test_a_conversion_copies_one_layer_at_a_time_to_the_host(
    conversion, options, run_here, monkeypatch
):
    from training import export

    alive: list[weakref.ref] = []

    def host_copy(weight: torch.Tensor) -> torch.Tensor:
        assert sum(copy() is not None for copy in alive) <= 1  # of the layer before
        copied = weight.detach().clone()
        alive.append(weakref.ref(copied))
        return copied

    monkeypatch.setattr(export, "host_copy", host_copy)
    assert run_here([*options, "--algorithm=OFT", f"--export.convert={conversion}"]) == 0
    assert len(alive) > 10


SECRET = "hf_doNotPublishMe0123456789"


def test_published_files_hold_no_paths_and_no_secrets(
    run_here, tmp_path, images, cache_dir, monkeypatch
):
    """Everything that is sent to others: adapters in all formats, samples, pictures, the report."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    private = tmp_path / "alice_secret"
    private.mkdir()
    moved = images.rename(private / "cats")
    out = private / "out"
    arguments = [
        f"--model.path={BASE}",
        f"--data.path={moved}",
        f"--data.cache_dir={cache_dir}",
        "--data.resolution=64",
        f"--output_dir={out}",
        "--steps=2",
        "--training_dtype=fp32",
        "--adapter.targets=attention",
        "--sample.every=2",
        "--sample.at_start",
        "--export.every=2",
        "--sample.grid=1",
        "--sample.num_inference_steps=1",
        "--export.formats",
        "kohya",
        "diffusers",
        "comfyui",
        "peft",
    ]
    assert run_here(arguments) == 0
    published = [path for path in out.rglob("*") if path.suffix in PUBLISHED and path.is_file()]
    published += out.glob("*.peft/*")
    published = [path for path in published if "checkpoints" not in path.parts]
    assert len(published) > 12
    host = socket.gethostname()
    telling = [str(tmp_path), "alice_secret", str(BASE.parent), SECRET]
    if len(host) > 5:  # "vm" is part of other words
        telling.append(host)
    for path in published:
        content = path.read_bytes()
        for text in telling:
            assert text.encode() not in content, (path.name, text)


PUBLISHED = (".safetensors", ".png", ".webp", ".html")


@pytest.mark.parametrize("kind", ["public", "full", "none"])
def test_the_metadata_that_a_file_holds(options, run_here, tmp_path, kind):
    assert run_here([*options, "--steps=2", f"--export.metadata={kind}"]) == 0
    with safe_open(tmp_path / "out" / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["train_lora.total_steps"] == "2"
    assert metadata["ss_network_module"]
    if kind == "none":
        assert not [key for key in metadata if key.startswith(("train_lora.config", "ss_tag"))]
        return
    config = yaml.safe_load(metadata["train_lora.config"])
    assert config["rank"] == 4
    path = str(tmp_path / "images")
    assert config["data"]["path"] == (path if kind == "full" else ".../images")
    assert "ss_tag_frequency" in metadata
