"""Grids of steps and strengths, the strength of a prompt, and rough numbers about samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.project import BASE
from helpers.runs import assert_same_result
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from training.reporting.json_lines import JsonLines
from training.sampling import grid, measures
from training.sampling.clip_score import ClipScore
from training.sampling.files import read_still
from training.sampling.measures import DataImages, as_text, measure_samples, small_image
from training.sampling.prompts import parse_prompt

GRID = ["--export.every=2", "--sample.grid=2", "--sample.num_inference_steps=2"]
PROMPTS = ["--sample.prompts", "a cat", "a dog"]
STRONG = "--learning_rate=1e-2"


def grids_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "samples").glob("*-grid_*")}


def cells(path: Path) -> np.ndarray:
    """The cells of a grid of two rows and four columns: (rows, columns, 128, 128, 3)."""
    pixels = np.asarray(Image.open(path).convert("RGB"), float)
    left, gap, side = 72, 8, 128
    rows = []
    for row in range(2):
        top = gap + row * (side + gap)
        starts = [left + column * (side + gap) for column in range(4)]
        rows.append([pixels[top : top + side, start : start + side] for start in starts])
    return np.array(rows)


def test_a_grid_has_a_row_for_each_step_and_a_column_for_each_strength(options, run_here, tmp_path):
    more = ["--sample.every=2", "--sample.at_start", STRONG]
    assert run_here([*options, *GRID, *PROMPTS, *more]) == 0
    out = tmp_path / "out"
    assert sorted(grids_in(out)) == ["lora-grid_00.png", "lora-grid_01.png"]
    assert not (out / "checkpoints" / "grid").exists()
    images = cells(out / "samples" / "lora-grid_01.png")
    size = (128, 128)
    for row, step in enumerate((4, 6)):
        sample = Image.open(out / "samples" / f"lora-step0000000{step}_01.png")
        enlarged = np.asarray(sample.resize(size, Image.Resampling.LANCZOS), float)
        assert np.abs(images[row, 2] - enlarged).max() <= 1, "strength 1 is the sample of the step"
    base = Image.open(out / "samples" / "lora-step00000000_01.png")
    enlarged = np.asarray(base.resize(size, Image.Resampling.LANCZOS), float)
    distances = [np.abs(image - enlarged).mean() for image in images[1]]
    assert distances == sorted(distances), "the stronger, the further from the base"
    assert distances[0] > 0.1


def test_a_resumed_run_draws_the_same_grid(options, run_here, tmp_path):
    """The weights of the steps before the kill are kept with the checkpoints."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_here([*options, *GRID, *PROMPTS, f"--output_dir={whole}"]) == 0
    first = [*options, *GRID, *PROMPTS, "--sample.grid=1", "--steps=4"]
    assert run_here([*first, f"--output_dir={resumed}"]) == 0
    other = grids_in(resumed)
    assert run_here([*options, *GRID, *PROMPTS, f"--output_dir={resumed}"]) == 0
    assert grids_in(resumed) != other
    assert_same_result(whole, resumed)


def test_the_weights_of_earlier_steps_are_there_after_a_kill(
    options, run_here, tmp_path, monkeypatch
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_here([*options, *GRID, *PROMPTS, f"--output_dir={whole}"]) == 0

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(grid.SampleGrid, "draw", kill)
        with pytest.raises(Killed):
            run_here([*options, *GRID, *PROMPTS, f"--output_dir={killed}"])
    assert grids_in(killed) == {}
    kept = sorted(path.name for path in (killed / "checkpoints" / "grid").iterdir())
    assert kept == ["step_00000004.safetensors", "step_00000006.safetensors"]
    assert run_here([*options, *GRID, *PROMPTS, f"--output_dir={killed}"]) == 0
    assert grids_in(killed) == grids_in(whole)


def test_a_grid_that_cannot_be_drawn_costs_the_grid_alone(
    options, run_here, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise OSError("no weights today")

    monkeypatch.setattr(grid, "read_weights", fail)
    assert run_here([*options, *GRID]) == 0
    assert "are left out: OSError: no weights today" in capsys.readouterr().out
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_a_grid_that_is_asked_for_later_says_why_it_is_left_out(options, run_here, capsys):
    assert run_here([*options, "--export.every=2"]) == 0
    assert run_here([*options, *GRID, "--sample.prompts", "a cat"]) == 0
    assert "left out: no weights of exported steps are kept" in capsys.readouterr().out


def test_an_error_in_writing_grids_costs_the_grids_alone(
    options, run_here, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(grid, "grid_png", fail)
    assert run_here([*options, *GRID, "--sample.prompts", "a cat"]) == 0
    assert "are left out: MemoryError" in capsys.readouterr().out


def test_a_grid_has_its_own_strengths(options, run_here, tmp_path):
    """Not those of the prompts: a column tells which strength to set in another program."""
    prompts = ["--sample.prompts", "a cat", "a cat --d 0 --am 0"]
    assert run_here([*options, *GRID, *prompts, STRONG]) == 0
    first, second = grids_in(tmp_path / "out").values()
    assert first == second


def test_a_grid_needs_exported_steps(options, run_here, capsys):
    assert run_here([*options, "--sample.grid=2"]) == 2
    assert "--sample.grid 2: needs exported steps. Also set --export.every" in (
        capsys.readouterr().err
    )


def test_the_summary_says_what_a_grid_costs(options, run_here, capsys):
    assert run_here([*options, *GRID, *PROMPTS]) == 0
    line = "grid        2 prompts x up to 2 exported steps x 4 strengths at the end, 32 denoising steps"
    assert line in capsys.readouterr().out


def test_the_strength_of_a_prompt(options, run_here, tmp_path):
    assert parse_prompt("a cat --am 0.5").strength == 0.5
    with pytest.raises(ValueError, match="--am 11: expected a number from -10 to 10"):
        parse_prompt("a cat --am 11")
    prompts = ["--sample.prompts", "a cat", "a cat --d 0 --am 0", "a cat --d 0 --am 2"]
    more = ["--sample.every=6", "--sample.at_start", "--sample.num_inference_steps=2", STRONG]
    assert run_here([*options, *more, *prompts]) == 0
    folder = tmp_path / "out" / "samples"
    base = read_still(folder / "lora-step00000000_00.png")
    plain, off, double = [
        read_still(folder / f"lora-step00000006_{number:02d}.png") for number in range(3)
    ]
    assert np.array_equal(off, base)
    assert np.abs(double - base).mean() > 1.2 * np.abs(plain - base).mean() > 0
    parameters = Image.open(folder / "lora-step00000006_01.png").text["parameters"]
    assert "Lora: lora-step00000006, Lora strength: 0" in parameters


def noise_images(count: int, seed: int = 0) -> np.ndarray:
    """Images (count, 64, 64, 3) of sixteen random colors each."""
    colors = np.random.default_rng(seed).random((count, 4, 4, 3))
    return colors.repeat(16, axis=1).repeat(16, axis=2)


def test_a_copy_has_no_distance():
    images = noise_images(20)
    data = DataImages.from_text(as_text([small_image(image) for image in images]))
    assert data.relative_distance(images[7]) < 0.02
    others = [data.relative_distance(image) for image in noise_images(5, seed=1)]
    assert 0.7 < np.mean(others) < 1.3
    assert DataImages.from_text(as_text([])) is None
    assert DataImages.from_text(as_text([small_image(images[0])] * 3)) is None, "all are equal"


def test_contrast_and_saturation_are_those_of_the_base_times_a_factor():
    images = noise_images(3)
    gray_axis = images.mean(axis=-1, keepdims=True)
    stronger = 0.5 + 1.5 * (images - 0.5)
    more_colorful = gray_axis + 2 * (images - gray_axis)
    metrics = measure_samples([*stronger], [*images], None)
    assert metrics["samples/contrast"] == pytest.approx(1.5)
    assert metrics["samples/saturation"] == pytest.approx(1.5)
    metrics = measure_samples([*more_colorful], [*images], None)
    assert metrics["samples/saturation"] == pytest.approx(2)
    assert measure_samples([*images], [], None) == {}
    black = np.zeros((8, 8, 3))
    assert np.isfinite([*measure_samples([black], [black], None).values()]).all()


def test_a_run_measures_its_samples(options, run_here, tmp_path):
    more = ["--sample.every=3", "--sample.at_start", "--sample.num_inference_steps=2"]
    assert run_here([*options, *more]) == 0
    out = tmp_path / "out"
    rows = [row for row in JsonLines(out / "metrics.jsonl").rows() if "samples/contrast" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert rows[0]["samples/contrast"] == pytest.approx(1, abs=0.01), "the file has 8 bits"
    assert all(row["samples/nearest_image"] > 0 for row in rows)
    facts = json.loads((out / "report.json").read_text())
    assert len(DataImages.from_text(facts["small_images"]).small_images) == 4


def test_trackers_get_the_measures_too(options, run_here, monkeypatch):
    """The step is saved before samples are drawn, so its metrics are sent twice."""
    sent: dict[int, set[str]] = {}

    def log(self, values, step, **_):
        sent.setdefault(step, set()).update(values)

    monkeypatch.setattr("accelerate.Accelerator.log", log)
    more = ["--sample.every=3", "--sample.num_inference_steps=1", "--tracking.log_every=1"]
    assert run_here([*options, *more]) == 0
    for step in (3, 6):
        assert {"train/loss", "samples/nearest_image"} <= sent[step]


def test_samples_that_cannot_be_measured_end_nothing(
    options, run_here, tmp_path, monkeypatch, capsys
):
    more = ["--sample.every=3", "--sample.at_start", "--sample.num_inference_steps=1"]
    assert run_here([*options, *more, "--steps=3"]) == 0
    (tmp_path / "out" / "samples" / "lora-step00000000_00.png").write_bytes(b"damaged")
    assert run_here([*options, *more]) == 0
    assert "note: the samples were not measured" in capsys.readouterr().out
    assert run_here([*options, *more, "--steps=9", "--sample.prompts", "another"]) == 0
    rows = JsonLines(tmp_path / "out" / "metrics.jsonl").rows()
    assert not [row for row in rows if row["step"] == 9 and "samples/contrast" in row]


def test_the_same_measure_as_by_hand():
    images = noise_images(4)
    data = DataImages.of(np.array([small_image(image) for image in images]))
    pairs = [
        np.sqrt(((images[a] - images[b]) ** 2).mean()) for a in range(4) for b in range(4) if a != b
    ]
    nearest = np.array(pairs).reshape(4, 3).min(axis=1)
    assert data.typical_distance == pytest.approx(np.median(nearest), rel=0.01)
    other = noise_images(1, seed=5)[0]
    distance = min(np.sqrt(((other - image) ** 2).mean()) for image in images)
    expected = distance / np.median(nearest)
    assert data.relative_distance(other) == pytest.approx(expected, rel=0.01)
    assert measures.SIDE == 16


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP model with random weights, and the tokenizer of the embedded base."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
            "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    vision = {**sizes, "image_size": 30, "patch_size": 15}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    size = {"height": 30, "width": 30}
    images = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=size)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_cosine(clip_folder):
    clip = ClipScore(clip_folder)
    images = [*noise_images(2)]
    texts = ["a cat", "a dog"]
    inputs = clip.processor(
        text=texts,
        images=[Image.fromarray((255 * image).round().astype(np.uint8)) for image in images],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        logits = clip.model(**inputs).logits_per_image / clip.model.logit_scale.exp()
    assert clip.score(images, texts) == pytest.approx(
        100 * logits.diagonal().mean().item(), rel=1e-4
    )
    assert clip.score(images[:1], ["many words " * 100]) == pytest.approx(0, abs=100)


def test_a_score_is_in_the_metrics_and_changes_no_bit(
    options, run_here, tmp_path, clip_folder, capsys
):
    more = ["--sample.every=3", "--sample.num_inference_steps=1", "--adapter.dropout=0.3"]
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    assert run_here([*options, *more, f"--output_dir={plain}"]) == 0
    assert (
        run_here([*options, *more, f"--sample.score_model={clip_folder}", f"--output_dir={scored}"])
        == 0
    )
    assert_same_result(plain, scored)
    rows = [
        row for row in JsonLines(scored / "metrics.jsonl").rows() if "samples/clip_score" in row
    ]
    assert [row["step"] for row in rows] == [3, 6]
    (scored / "model.safetensors").write_bytes(b"")
    broken = [
        *options,
        *more,
        f"--sample.score_model={scored}",
        f"--output_dir={tmp_path / 'broken'}",
    ]
    assert run_here(broken) == 0, "a model that cannot be loaded costs the score alone"
    out = capsys.readouterr().out
    assert out.count("note: --sample.score_model") == 1
    rows = JsonLines(tmp_path / "broken" / "metrics.jsonl").rows()
    assert [row["step"] for row in rows if "samples/nearest_image" in row] == [3, 6]
    assert run_here([*options, "--sample.score_model=missing"]) == 2
