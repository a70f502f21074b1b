"""Preservation: what the adapted model predicts for neutral prompts stays near what the base predicts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.project import BASE
from helpers.runs import assert_same_result, result_of

from adapter_files.spellings import layer_spellings
from common.errors import ConfigError
from data.batches import MicroBatches
from data.dataset import LatentDataset
from data.precompute.build import DatasetBuilder
from data.prompts import NEUTRAL
from data.schedule import Schedule
from lora_algos import ALGORITHMS
from models.config import ModelConfig
from models.detect import get_family
from objectives.config import ObjectiveConfig, PreserveConfig
from training.build import attach_adapters, extra_prompts
from training.cli import load_config
from training.loss import build_loss

PRESERVE = ["--objective.preserve.weight=1", "--objective.preserve.prompts", "a face", ""]


def metrics(folder: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_training_losses_are_those_of_the_captions(run_into):
    """The first step has the same loss; later ones differ, because the gradients do."""
    plain, preserving = run_into("plain"), run_into("preserving", *PRESERVE)
    losses, adapter = result_of(plain)
    other_losses, other_adapter = result_of(preserving)
    assert other_losses[0] == losses[0]
    assert other_losses[1:] != losses[1:]
    assert any(not other_adapter[key].equal(adapter[key]) for key in adapter)
    values = metrics(preserving, "train/preservation")
    assert len(values) == 2
    assert values[1] > values[0] >= 0, "a new adapter changes nothing yet"
    assert metrics(plain, "train/preservation") == []


def test_a_larger_weight_preserves_more(run_into):
    rate = ("--learning_rate=1e-2", "--steps=30", "--tracking.log_every=30")
    prompt = ("--objective.preserve.prompts", "a face")
    light = run_into("light", *rate, "--objective.preserve.weight=1e-6", *prompt)
    heavy = run_into("heavy", *rate, "--objective.preserve.weight=10", *prompt)
    assert metrics(heavy, "train/preservation")[0] < 0.5 * metrics(light, "train/preservation")[0]


@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(run_into, run_here, options, tmp_path, every):
    more = [*PRESERVE, f"--objective.preserve.every={every}", "--grad_accumulation_steps=2"]
    whole = run_into("whole", *more)
    half = run_into("half", *more, "--steps=3")
    mine = [*options, *more, f"--output_dir={half}", "--steps=6"]
    assert run_here(mine) == 0
    assert_same_result(whole, half)


@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_checkpointing", "--memory.offload_blocks=all"],
        ["--algorithm=OFT", "--gradient_checkpointing"],
    ],
    ids=["offload", "OFT"],
)
def test_memory_options_change_no_bit(run_into, more):
    plain = [option for option in more if option.startswith("--algorithm")]
    assert_same_result(run_into("plain", *PRESERVE, *plain), run_into("small", *PRESERVE, *more))


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(name, marks=() if name in ("LoRA", "DoRA") else pytest.mark.long)
        for name in ALGORITHMS
    ],
)
def test_the_difference_is_that_from_the_base(options, algorithm, tmp_path, run_here):
    """It is 0 for a new adapter, and after changes that from a base without any adapter."""
    assert run_here([*options, *PRESERVE, "--steps=1", f"--output_dir={tmp_path / 'out'}"]) == 0
    dataset = DATASETS[-1]
    config = load_config([*options, *PRESERVE, f"--algorithm={algorithm}", "--adapter.targets=all"])
    family = get_family(ModelConfig(path=str(BASE)))
    denoiser = family.load_denoiser(torch.float32)
    plain = family.load_denoiser(torch.float32)
    adapted, _ = attach_adapters(config, family, denoiser, layer_spellings(family, denoiser))
    loss = build_loss(family, config.objective, "MSE", torch.float32)
    schedule = Schedule(dataset.buckets, dataset.content_hash, 0, 2)
    batch = MicroBatches(dataset, schedule, config.objective)[0]
    neutral = batch.prompts[NEUTRAL]
    new = loss.preservation(denoiser, adapted, batch)
    assert new.abs().max() < 1e-9
    with torch.no_grad():
        for parameter in adapted.named_parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = loss.preservation(denoiser, adapted, batch)
    noised = loss.add_noise(batch)
    with torch.no_grad():
        expected = loss.predict(denoiser, noised, batch, neutral)
        base = loss.predict(plain, noised, batch, neutral)
    torch.testing.assert_close(
        found, (expected - base).square().flatten(1).mean(1), rtol=1e-4, atol=1e-7
    )
    assert found.min() > 1e-6
    found.mean().backward()
    assert all(p.grad is not None for p in adapted.named_parameters().values())


DATASETS: list[LatentDataset] = []
"""The data sets of the runs of this process."""


@pytest.fixture(autouse=True)
def recorded_datasets(monkeypatch):
    original = DatasetBuilder.encode

    def encode(self, *arguments):
        datasets = original(self, *arguments)
        DATASETS.append(datasets.train)
        return datasets

    monkeypatch.setattr(DatasetBuilder, "encode", encode)


def test_each_batch_draws_a_prompt_as_a_function_of_the_seed(options, run_here, tmp_path):
    assert run_here([*options, *PRESERVE, "--steps=1"]) == 0
    dataset = DATASETS[-1]
    assert set(dataset.extra_prompts) == {"a face", ""}
    objective = ObjectiveConfig(preserve=PreserveConfig(1.0, 3, ("a face", "")))
    batches = MicroBatches(dataset, Schedule(dataset.buckets, "x", 0, 2), objective, per_step=2)
    has_prompt = [NEUTRAL in batches[number].prompts for number in range(12)]
    assert has_prompt == [True, True, False, False, False, False] * 2
    shapes = {
        float(batches[number].prompts[NEUTRAL]["prompt_embeds"].sum()) for number in range(0, 60, 6)
    }
    assert len(shapes) == 2, "both prompts are drawn"
    first = batches[0].prompts[NEUTRAL]["prompt_embeds"]
    assert first.equal(batches[0].prompts[NEUTRAL]["prompt_embeds"])


def test_options_without_a_weight_are_refused(options, run_here, capsys):
    assert run_here([*options, "--objective.preserve.every=2"]) == 2
    assert "have no effect without --objective.preserve.weight" in capsys.readouterr().err


def test_models_that_see_images_with_prompts_are_refused():
    from helpers.families import qwen_image_edit
    from helpers.family_cases import family_of

    config = replace(load_config([]), objective=ObjectiveConfig(preserve=PreserveConfig(1.0)))
    with pytest.raises(ConfigError, match="a prompt alone has no meaning"):
        extra_prompts(config, family_of(qwen_image_edit.CASE))


CLASS = ["--objective.preserve.weight=1", "--objective.preserve.class_word=a face"]


@pytest.fixture(scope="module")
def encoded():
    """Encodes a text with the embedded model."""
    family = get_family(ModelConfig(path=str(BASE)))
    encoders = family.load_encoders("text")

    def encode(text: str) -> torch.Tensor:
        with torch.no_grad():
            return family.encode_prompt(encoders, [text])[0]["prompt_embeds"]

    return encode


def is_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first.float(), second.float(), atol=1e-3)


def test_the_class_takes_the_place_of_the_trigger_in_each_caption(
    options, run_here, images, encoded
):
    """In the caption that is drawn, also if tags are shuffled, and not in regularization images."""
    (images / "cat.txt").write_text("sks in the snow")
    (images / "dog.txt").write_text("with a hat")
    more = ["--data.captions.trigger=sks", "--data.captions.one_per_line"]
    (images / "owl.txt").write_text("sks at night\nsks by day")
    assert run_here([*options, *CLASS, *more, "--steps=1"]) == 0
    dataset = DATASETS[-1]
    expected = {
        "sks in the snow": "a face in the snow",
        "sks, with a hat": "a face, with a hat",
        "sks at night": "a face at night",
        "sks by day": "a face by day",
    }
    batches = MicroBatches(
        dataset,
        Schedule(dataset.buckets, "x", 0, 1),
        ObjectiveConfig(preserve=PreserveConfig(1.0, class_word="a face")),
    )
    seen = set()
    for number in range(40):
        batch = batches[number]
        for caption, class_caption in expected.items():
            if is_close(batch.cond["prompt_embeds"][0], encoded(caption)):
                seen.add(caption)
                neutral = batch.prompts[NEUTRAL]["prompt_embeds"][0]
                assert is_close(neutral, encoded(class_caption)), caption
    assert seen == set(expected)


def test_a_dropped_caption_has_no_class(options, run_here, encoded):
    more = ["--data.captions.trigger=sks", "--data.captions.dropout=1"]
    assert run_here([*options, *CLASS, *more, "--steps=1"]) == 0
    dataset = DATASETS[-1]
    objective = ObjectiveConfig(preserve=PreserveConfig(1.0, class_word="a face"))
    batch = MicroBatches(dataset, Schedule(dataset.buckets, "x", 0, 2), objective)[0]
    empty = encoded("")
    for neutral in batch.prompts[NEUTRAL]["prompt_embeds"]:
        assert is_close(neutral, empty)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "replaces --data.captions.trigger, which is not set"),
        (
            ["--data.captions.trigger=sks", "--objective.preserve.prompts", "a dog"],
            "have no effect with --objective.preserve.class_word",
        ),
    ],
    ids=["no trigger", "prompts too"],
)
def test_a_class_without_its_place_is_refused(options, run_here, capsys, more, message):
    assert run_here([*options, *CLASS, *more]) == 2
    assert message in capsys.readouterr().err


def test_runs_with_one_cache_have_their_own_class(run_into, encoded, images):
    """Also after a run with another class, or with none."""
    trigger = "--data.captions.trigger=sks"
    for path in images.glob("*.txt"):
        path.write_text("sks at sea")
    for name in ("a dog", "a cat", "", "a dog"):
        more = [f"--objective.preserve.class_word={name}"] if name else []
        weight = "--objective.preserve.weight=1"
        run_into(f"out{len(DATASETS)}", trigger, weight, "--steps=1", *more)
        dataset = DATASETS[-1]
        row_id = dataset.class_caption_id(0)
        stored = dataset.text.read_row(row_id)["prompt_embeds"]
        expected = f"{name} at sea" if name else "sks at sea"
        assert is_close(stored, encoded(expected)), name


@pytest.mark.parametrize(
    ("class_word", "message"),
    [("an sks dog", "contains the trigger 'sks'"), (" ", "is blank")],
    ids=["trigger", "blank"],
)
def test_a_class_that_is_none_is_refused(options, run_here, capsys, class_word, message):
    more = ["--data.captions.trigger=sks", f"--objective.preserve.class_word={class_word}"]
    assert run_here([*options, "--objective.preserve.weight=1", *more]) == 2
    assert message in capsys.readouterr().err
