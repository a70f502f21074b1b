"""Samples while a run trains: what is drawn, when, and what it costs: no bit of the training."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.family_cases import SIDE, cases, folder_of
from helpers.project import BASE
from helpers.runs import assert_same_result
from PIL import Image
from safetensors.torch import load_file

from models.config import ModelConfig
from models.detect import get_family
from training import cli
from training.output_config import SampleConfig
from training.sampling import prepare, renderer
from training.sampling.encoded_prompts import encode_prompts
from training.sampling.overview import shown_steps, thumbnail, write_overview
from training.sampling.prompts import SamplePrompt, configured_prompts, parse_prompt

VIDEO = next(case for case in cases() if str(case) == "wan")
SAMPLED = ["--sample.every=2", "--sample.num_inference_steps=2"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "samples").iterdir())


def test_samples_change_no_bit_of_the_training(options, run_here, tmp_path):
    options = [
        *options,
        "--ema.decay=0.9",
        "--adapter.dropout=0.3",
        "--data.validation_fraction=0.3",
    ]
    plain, sampled = tmp_path / "plain", tmp_path / "sampled"
    assert run_here([*options, f"--output_dir={plain}"]) == 0
    more = [*SAMPLED, "--sample.at_start", "--export.every=3"]
    assert run_here([*options, *more, f"--output_dir={sampled}"]) == 0
    assert_same_result(plain, sampled)
    steps = {name.split("_")[0].removeprefix("lora-") for name in names_in(sampled)} - {"steps.png"}
    assert steps == {f"step{step:08d}" for step in (0, 2, 4, 6)}


def test_the_files_of_a_step(options, run_here, tmp_path, capsys):
    prompts = ["a cat --n dog --w 64 --h 128 --d 7 --l 2.5 --s 3", "an owl"]
    more = ["--sample.prompts", *prompts, "--steps=2", "--export.name=fox"]
    assert run_here([*options, *SAMPLED, *more]) == 0
    out = tmp_path / "out"
    first, second, sheet, overview = names_in(out)
    assert overview == "fox-steps.png"
    assert first == "fox-step00000002_00.png"
    assert second == "fox-step00000002_01.png"
    image = Image.open(out / "samples" / first)
    assert image.size == (64, 128)
    lines = image.text["parameters"].splitlines()
    assert lines[:2] == ["a cat", "Negative prompt: dog"]
    assert lines[2] == "Steps: 3, CFG scale: 2.5, Seed: 7, Size: 64x128, Lora: fox-step00000002"
    assert str(tmp_path) not in image.text["parameters"]
    assert Image.open(out / "samples" / second).size == (64, 64)
    assert Image.open(out / "samples" / sheet).height > 128
    assert "step 2: 2 samples in" in capsys.readouterr().out


def test_the_name_of_an_adapter_may_contain_dots(options, run_here, tmp_path):
    more = ["--sample.prompts", "a cat", "an owl", "--export.name=fox-v1.0", "--steps=2"]
    assert run_here([*options, *SAMPLED, *more]) == 0
    assert names_in(tmp_path / "out") == [
        "fox-v1.0-step00000002_00.png",
        "fox-v1.0-step00000002_01.png",
        "fox-v1.0-step00000002_sheet.png",
        "fox-v1.0-steps.png",
    ]


def test_samples_are_of_the_weights_that_would_be_exported(options, run_here, tmp_path):
    """The last sample is the one of the preview, which is drawn with the exported weights."""
    more = ["--preview", "--sample.prompts", "a cat", "--learning_rate=1e-2", "--ema.decay=0.5"]
    assert run_here([*options, *SAMPLED, "--sample.at_start", *more]) == 0
    folder = tmp_path / "out" / "samples"
    drawn = [np.asarray(Image.open(folder / f"lora-step0000000{step}_00.png")) for step in (0, 6)]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() > 10, "the adapter does something"
    grid = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    enlarged = [
        np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.LANCZOS))
        for image in drawn
    ]
    assert all(contains(grid, image) for image in enlarged)


def contains(grid: np.ndarray, image: np.ndarray) -> bool:
    height, width, _ = image.shape
    corners = np.argwhere((grid[: -height + 1, : -width + 1] == image[0, 0]).all(2))
    return any(np.array_equal(grid[y : y + height, x : x + width], image) for y, x in corners)


class Killed(BaseException):
    pass


def test_a_process_that_is_killed_while_it_draws_has_lost_nothing(
    options, run_here, tmp_path, monkeypatch
):
    options = [*options, *SAMPLED, "--checkpoint.every=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here([*options, f"--output_dir={whole}"]) == 0
    original, calls = renderer.draw_sample, []

    def kill(*args: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 6:  # the second image of step 4
            raise Killed
        return original(*args)

    monkeypatch.setattr(renderer, "draw_sample", kill)
    with pytest.raises(Killed):
        run_here([*options, f"--output_dir={parts}"])
    assert not any("step00000004" in name for name in names_in(parts))
    assert run_here([*options, f"--output_dir={parts}"]) == 0
    assert_same_result(whole, parts)
    assert names_in(parts) == names_in(whole)
    for name in names_in(whole):
        assert (parts / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()


def test_a_run_that_stops_early_draws_its_last_step(options, run_here, tmp_path):
    stopping = ["--data.validation_fraction=0.3", "--validation.every=1", "--validation.patience=1"]
    more = ["--validation.min_delta=100", "--sample.every=50", "--sample.num_inference_steps=1"]
    assert run_here([*options, *stopping, *more]) == 0
    steps = {name.split("_")[0] for name in names_in(tmp_path / "out")} - {"lora-steps.png"}
    (step,) = steps
    assert step < "lora-step00000006"


def test_one_picture_shows_all_steps(options, run_here, tmp_path):
    prompts = ["--sample.prompts", "a cat --w 64 --h 128", "an owl"]
    assert run_here([*options, *SAMPLED, "--sample.at_start", *prompts]) == 0
    folder = tmp_path / "out" / "samples"
    picture = np.asarray(Image.open(folder / "lora-steps.png"))
    rows = 4
    assert picture.shape[0] == 8 + rows * (2 * 128 + 8) + 44, "tiny samples are enlarged"
    cat, owl = SamplePrompt("a cat"), SamplePrompt("an owl")
    files = shown_steps(folder, "lora", [cat, owl])
    assert list(files) == [0, 2, 4, 6]
    assert shown_steps(folder, "lora", [cat, owl, owl]) == {}
    assert list(shown_steps(folder, "lora", [cat])) == [0, 2, 4, 6], (
        "files of earlier prompts may be left"
    )
    assert shown_steps(folder, "lora", [cat, cat]) == {}, "the second sample is of another prompt"
    first = thumbnail(files[6][1], (64, 128))
    assert first.shape == (128, 64, 3)
    assert first[0].min() == 1, "padded with white"
    for step in range(8, 40, 2):
        for path in files[6]:
            (folder / path.name.replace("step00000006", f"step{step:08d}")).write_bytes(b"")
    assert list(shown_steps(folder, "lora", [cat, owl])) == [0, *range(18, 40, 2)]
    cat, owl = [SamplePrompt(text, width=64, height=64) for text in ("a cat", "an owl")]
    assert write_overview(folder, "lora", [cat, owl]) == folder / "lora-steps.png"
    assert write_overview(folder, "other", [owl]) is None


@pytest.mark.parametrize("moment", ["drawing", "encoding", "writing"])
def test_a_failure_is_said_once_and_ends_nothing(
    moment, options, run_here, tmp_path, monkeypatch, capsys
):
    def fail(*_: object) -> None:
        raise OSError("no room")

    target = {
        "drawing": (renderer, "draw_sample"),
        "encoding": (prepare, "encode_prompts"),
        "writing": ("training.sampling.callback.write_samples",),
    }[moment]
    monkeypatch.setattr(*target, fail)
    plain, failed = tmp_path / "plain", tmp_path / "failed"
    assert run_here([*options, f"--output_dir={plain}"]) == 0
    capsys.readouterr()
    assert (
        run_here(
            [*options, *SAMPLED, "--sample.prompts", f"an owl {moment}", f"--output_dir={failed}"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert said.count("could not be ") == (3 if moment == "writing" else 1)
    assert_same_result(plain, failed)


def test_a_sample_without_memory_names_the_phase(options, run_here, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(renderer, "draw_sample", fail)
    assert run_here([*options, *SAMPLED, "--steps=2"]) == 0
    said = capsys.readouterr().out
    assert "The GPU's memory ran out in the phase `samples`" in said
    assert "Use --model.vae_tiling, smaller samples" in said


def test_a_step_is_saved_before_its_samples_are_drawn(options, run_here, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(renderer, "draw_sample", kill)
    with pytest.raises(Killed):
        run_here([*options, "--sample.every=3", "--checkpoint.every=100"])
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob("step_*")] == [
        "step_00000003"
    ]


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_sharded_model_ends_a_run_only_in_the_middle_of_an_image(
    moment, options, run_here, tmp_path, monkeypatch, capsys
):
    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(renderer, "is_sharded", lambda accelerator: True)
    target = (prepare, "encode_prompts") if moment == "before" else (renderer, "draw_sample")
    monkeypatch.setattr(*target, fail)
    prompts = ["--sample.prompts", f"a sharded cat {moment}"]
    code = run_here([*options, *SAMPLED, *prompts])
    assert code == (0 if moment == "before" else 1)
    said = capsys.readouterr()
    assert "samples could not be drawn" in said.out + said.err
    if moment == "during":
        assert "The checkpoint of the last saved step is complete" in said.err
        assert any((tmp_path / "out" / "checkpoints").glob("step_*2"))


def test_a_failed_encoding_frees_the_text_encoders(monkeypatch):
    family = get_family(ModelConfig(path=str(BASE)))
    pipeline = family.load_encoders("text")
    encoder = weakref.ref(pipeline.text_encoder)
    loaded = [pipeline]
    monkeypatch.setattr(type(family), "load_encoders", lambda *_: loaded.pop())
    prompt = SamplePrompt("a cat", guidance_scale=1.0, width=7, height=7)  # no multiples of 8
    with pytest.raises(ValueError, match="divisible by 8"):
        encode_prompts(family, ModelConfig(), [prompt], torch.device("cpu"))
    del pipeline
    monkeypatch.undo()
    assert encoder() is None


def test_the_model_that_encoded_a_prompt_is_part_of_its_key(tmp_path, monkeypatch):
    family = get_family(ModelConfig(path=str(BASE)))
    prompt = SamplePrompt("a cat")
    before = prepare.prompt_key(family, "hash", prompt, [])
    assert prepare.prompt_key(family, "hash", prompt, []) == before
    family.files.pipeline_config["force_zeros_for_empty_prompt"] = True
    changed = prepare.prompt_key(family, "hash", prompt, [])
    assert changed != before
    assert prepare.prompt_key(family, "other", prompt, []) != changed


def test_trackers_get_samples_at_the_step_of_the_metrics(options, run_here, tmp_path, monkeypatch):
    tracked = []
    monkeypatch.setattr(
        "training.sampling.callback.log_images", lambda _, images, step: tracked.append(step)
    )
    assert run_here([*options, "--steps=3", f"--output_dir={tmp_path / 'first'}"]) == 0
    lora = f"--existing_lora={tmp_path / 'first' / 'lora.safetensors'}"
    more = [*options, *SAMPLED, lora, "--steps=2"]
    assert run_here(more) == 0
    assert tracked == [5]


def test_an_export_that_an_earlier_process_missed_is_made_up_for(options, run_here, tmp_path):
    options = [*options, "--export.every=2", "--checkpoint.every=2"]
    assert run_here([*options, "--steps=4"]) == 0
    path = tmp_path / "out" / "lora-step00000004.safetensors"
    expected = load_file(path)
    path.unlink()
    assert run_here([*options, "--steps=6"]) == 0
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(path).items())


def test_a_model_without_negative_prompts_says_so(options, run_here, tmp_path, capsys):
    case = next(case for case in cases() if str(case) == "flux1-dev")
    replaced = ("--model.path", "--data.resolution", "--adapter.targets")
    kept = [option for option in options if not option.startswith(replaced)]
    model = [f"--model.path={folder_of(case)}", f"--data.resolution={SIDE}"]
    assert run_here([*kept, *model, *SAMPLED, "--steps=2", "--sample.prompts", "owl --n red"]) == 0
    assert "this model uses no negative prompts" in capsys.readouterr().out
    image = Image.open(tmp_path / "out" / "samples" / "lora-step00000002_00.png")
    assert "Negative" not in image.text["parameters"]


def test_encoded_prompts_are_kept(options, run_here, tmp_path, monkeypatch):
    """A second run loads no text encoders."""
    options = [*options, *SAMPLED, "--steps=2", "--sample.prompts", "a cat of this test"]
    assert run_here([*options, f"--output_dir={tmp_path / 'one'}"]) == 0
    monkeypatch.setattr(prepare, "encode_prompts", None)
    assert run_here([*options, f"--output_dir={tmp_path / 'two'}"]) == 0
    assert names_in(tmp_path / "one") == names_in(tmp_path / "two")
    name = names_in(tmp_path / "one")[0]
    one, two = (tmp_path / folder / "samples" / name for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_videos_are_written_as_webp_and_mp4(options, run_here, tmp_path, videos):
    import av

    replaced = ("--model.path", "--data.path", "--data.resolution", "--adapter.targets")
    kept = [option for option in options if not option.startswith(replaced)]
    model = [f"--model.path={folder_of(VIDEO)}", f"--data.resolution={SIDE}", *VIDEO.options]
    data = [f"--data.path={videos}", "--data.frames=5", "--sample.prompts", "an owl"]
    assert run_here([*kept, *model, *data, *SAMPLED, "--steps=2"]) == 0
    folder = tmp_path / "out" / "samples"
    name = "lora-step00000002_00"
    assert Image.open(folder / f"{name}.webp").n_frames == 5
    with av.open(str(folder / f"{name}.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    assert (folder / "lora-step00000002_sheet.png").is_file()


def test_an_exported_step_is_the_adapter_of_a_run_that_ends_there(options, run_here, tmp_path):
    assert run_here([*options, "--export.every=2", f"--output_dir={tmp_path / 'long'}"]) == 0
    assert run_here([*options, "--steps=4", f"--output_dir={tmp_path / 'short'}"]) == 0
    exported = load_file(tmp_path / "long" / "lora-step00000004.safetensors")
    expected = load_file(tmp_path / "short" / "lora.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[key], expected[key]) for key in expected)
    assert (tmp_path / "long" / "lora-step00000002.safetensors").is_file()
    assert not (tmp_path / "long" / "lora-step00000003.safetensors").exists()


def test_a_prompt_file_of_another_editor(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat --w 64\r\n  # comment\r\nan\u2028owl\r\n".encode())
    first, second = configured_prompts(SampleConfig(prompt_file=str(path)))
    assert first == SamplePrompt("a cat", width=64)
    assert second == SamplePrompt("an\u2028owl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --n --w 512", "--n: has no value"),
        ("--w 512", "has no text before its options"),
        ("a cat --w=512 --h 512", "--w=: write a space instead of ="),
        ("a cat --w 64 --w 32", "--w is repeated"),
    ],
)
def test_options_that_would_be_misread_are_errors(line, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(line)


def test_a_prompt_with_options():
    prompt = parse_prompt("a fox, --n red -- or -w  --w 512 --d 3 --l 0.5")
    assert prompt == SamplePrompt(
        "a fox,", negative="red -- or -w", width=512, seed=3, guidance_scale=0.5
    )
    assert parse_prompt("well--known owl") == SamplePrompt("well--known owl")


def error_of(options: list[str], capsys) -> str:
    import train_lora

    assert train_lora.main(options) == 2
    return capsys.readouterr().err


def test_all_errors_of_prompts_are_said_at_once(options, tmp_path, capsys):
    missing, latin, lines = tmp_path / "no.txt", tmp_path / "latin.txt", tmp_path / "lines.txt"
    latin.write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    lines.write_text("# comment\n\na cat\nan owl --q 3 --w wide --s 0\n")
    bad = ["--sample.prompts", "a cat --x 1", "an owl --h -3"]
    message = error_of([*options, *bad, f"--sample.prompt_file={lines}"], capsys)
    assert (
        "--sample.prompts 'a cat --x 1': --x is not an option of a prompt; expected --n, --w"
        in message
    )
    assert "--h -3: expected a whole number from 8 to 16384" in message
    assert f"--sample.prompt_file {lines}, line 4: --q is not an option" in message
    assert "--w wide: expected a whole number" in message
    assert "--s 0: expected a whole number from 1 to 1000" in message
    assert f"{missing}: could not be read" in error_of(
        [*options, f"--sample.prompt_file={missing}"], capsys
    )
    assert "is not a UTF-8 text file" in error_of(
        [*options, f"--sample.prompt_file={latin}"], capsys
    )


def test_a_size_that_the_model_cannot_draw_is_an_error_before_encoding(
    options, run_here, tmp_path, capsys
):
    assert run_here([*options, "--sample.prompts", "a cat --w 70 --h 64"]) == 2
    message = capsys.readouterr()
    assert (
        "--sample.prompts 'a cat --w 70 --h 64': --w 70 is not a multiple of 16. Use 64 or 80"
        in message.err
    )
    assert "encoding" not in message.out + message.err


def test_samples_may_change_when_a_run_is_resumed(options, run_here, tmp_path):
    assert run_here([*options, "--steps=2"]) == 0
    assert run_here([*options, *SAMPLED, "--sample.prompts", "an owl", "--steps=4"]) == 0
    assert "lora-step00000004_00.png" in names_in(tmp_path / "out")
    config = cli.load_config([*options, *SAMPLED])
    assert config.sample.every == 2
    assert json.loads((tmp_path / "out" / "loss.json").read_text())
