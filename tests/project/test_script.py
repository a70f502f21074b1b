"""The script as a user runs it: outputs, resuming, continuing, distribution, trackers."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from helpers.project import BASE, PROJECT, TWEMOJI, accelerate_launch, script
from helpers.runs import adapter, assert_same
from helpers.wandb_log import written_records
from PIL import Image
from safetensors import safe_open


def test_a_run_writes_what_it_promises(options, run_here, tmp_path):
    out = tmp_path / "out"
    more = ["--preview", "--sample.num_inference_steps=2", "--export.merged_model", "--checkpoint.every=2",
            f"--data.validation_path={TWEMOJI / 'validation'}", "--validation.every=3"]  # fmt: skip
    assert run_here([*options, *more]) == 0
    losses = json.loads((out / "loss.json").read_text())
    assert (
        len(losses["loss_per_step"])
        == len(losses["loss_per_micro_step"])
        == losses["total_steps"]
        == 6
    )
    assert [v["step"] for v in losses["validation"]] == [0, 3, 6]
    assert set(losses["validation"][0]) == {
        "step",
        "loss",
        *(f"quantile_0.{i}" for i in range(1, 10)),
    }
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000006",
    ]
    assert Image.open(out / "loss.png").size == (990, 550)
    assert np.asarray(Image.open(out / "preview.png")).std() > 10
    assert (out / "model_with_lora" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    with safe_open(out / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["train_lora.total_steps"] == metadata["ss_steps"] == "6"
    assert yaml.safe_load(metadata["train_lora.config"])["rank"] == 4
    assert all(isinstance(json.loads(v), dict) for v in metadata.values() if v.startswith("{"))


def test_the_resolved_config_repeats_the_run(options, run_here, tmp_path):
    assert run_here(options) == 0
    repeated = [str(tmp_path / "out" / "config.yaml"), f"--output_dir={tmp_path / 'again'}"]
    assert run_here(repeated) == 0
    assert_same(adapter(tmp_path / "out"), adapter(tmp_path / "again"))


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD", "RMSprop"])
def test_twelve_steps_equal_five_and_seven(options, run_here, tmp_path, optimizer):
    cosine = [
        "--optim.lr_scheduler=cosine",
        "--optim.lr_warmup_steps=2",
        f"--optimizer={optimizer}",
    ]
    straight = [*options, *cosine, "--steps=12", f"--output_dir={tmp_path / 'straight'}"]
    assert run_here(straight) == 0
    halves = [
        *options,
        *cosine,
        "--steps=12",
        "--checkpoint.every=5",
        f"--output_dir={tmp_path / 'halves'}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        assert run_here(halves) == 130
    assert run_here(halves) == 0
    assert_same(adapter(tmp_path / "straight"), adapter(tmp_path / "halves"))
    one, two = (
        json.loads((tmp_path / name / "loss.json").read_text()) for name in ("straight", "halves")
    )
    assert one == two


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Interrupts a run after `steps`, as Ctrl-C would."""
    from training.callbacks import HandleRequests

    original = HandleRequests.after_step

    def interrupted(self):
        if self.trainer.state.step == steps:
            signal.raise_signal(signal.SIGINT)
        original(self)

    patch.setattr(HandleRequests, "after_step", interrupted)


def test_kill_9_costs_nothing_but_the_steps_since_the_checkpoint(options, tmp_path):
    long = [*options, "--steps=60", "--checkpoint.every=5"]
    assert script([*long, f"--output_dir={tmp_path / 'straight'}"]).returncode == 0
    killed = tmp_path / "killed"
    command = [sys.executable, str(PROJECT / "train_lora.py"), *long, f"--output_dir={killed}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step_00000010").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "lora.safetensors").exists()
    result = script([*long, f"--output_dir={killed}"])
    assert result.returncode == 0, result.stderr
    assert "resumed at step" in result.stdout
    assert_same(adapter(tmp_path / "straight"), adapter(killed))


def test_validation_changes_no_training_loss(options, run_here, tmp_path):
    assert run_here(options) == 0
    held_out = [f"--data.validation_path={TWEMOJI / 'validation'}", "--validation.every=2"]
    assert run_here([*options, *held_out, f"--output_dir={tmp_path / 'validated'}"]) == 0
    one, two = (json.loads((tmp_path / n / "loss.json").read_text()) for n in ("out", "validated"))
    assert one["loss_per_micro_step"] == two["loss_per_micro_step"]
    assert_same(adapter(tmp_path / "out"), adapter(tmp_path / "validated"))


def test_gradient_checkpointing_changes_nothing_but_memory(options, run_here, tmp_path):
    assert run_here(options) == 0
    assert (
        run_here([*options, "--gradient_checkpointing", f"--output_dir={tmp_path / 'saving'}"]) == 0
    )
    one, two = adapter(tmp_path / "out"), adapter(tmp_path / "saving")
    assert all(two[name].allclose(one[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_existing_lora_is_continued_bit_for_bit(options, run_here, tmp_path, dtype):
    first = [
        *options,
        f"--lora_dtype={dtype}",
        "--adapter.alpha=3",
        "--adapter.targets",
        "attention",
        "conv_in",
    ]
    assert run_here(first) == 0
    saved = tmp_path / "out" / "lora.safetensors"
    # a rate that moves nothing: what comes out is what the run began with
    frozen = [*options, f"--lora_dtype={dtype}", f"--existing_lora={saved}", "--rank=16", "--steps=1",
              "--learning_rate=1e-7", "--optimizer=SGD", f"--output_dir={tmp_path / 'on'}"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.optim.SGD.step", lambda self, closure=None: None)
        assert run_here(frozen) == 0
    assert_same(adapter(tmp_path / "out"), adapter(tmp_path / "on"))
    with safe_open(tmp_path / "on" / "lora.safetensors", "pt") as file:
        assert file.metadata()["train_lora.total_steps"] == "7"
    assert json.loads((tmp_path / "on" / "loss.json").read_text())["total_steps"] == 7


@pytest.mark.long
def test_two_processes_train_what_one_does(options, tmp_path):
    single = [*options, "--grad_accumulation_steps=4", f"--output_dir={tmp_path / 'one'}"]
    double = [*options, "--grad_accumulation_steps=2", f"--output_dir={tmp_path / 'two'}"]
    assert script(single).returncode == 0
    launcher = accelerate_launch(
        "--multi_gpu", "--num_machines=1", "--num_processes=2", "--main_process_port=0"
    )
    result = script(double, launcher, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert "2 x 2 x 2 = 8 samples per step" in result.stdout
    one, two = (json.loads((tmp_path / n / "loss.json").read_text()) for n in ("one", "two"))
    assert two["loss_per_micro_step"] == pytest.approx(one["loss_per_micro_step"], rel=1e-5)
    assert len(two["loss_per_micro_step"]) == 24
    a, b = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert all(b[name].allclose(a[name], rtol=1e-4, atol=1e-6) for name in a)


def test_accelerate_launch_runs_the_script(options, tmp_path):
    result = script(options, accelerate_launch())
    assert result.returncode == 0, result.stderr
    assert "2 x 1 x 1 = 2 samples per step" in result.stdout
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_bf16_and_none_train_on_the_stored_weights(options, run_here, tmp_path):
    for dtype in ("bf16", "none"):
        assert (
            run_here([*options, f"--training_dtype={dtype}", f"--output_dir={tmp_path / dtype}"])
            == 0
        )
        losses = json.loads((tmp_path / dtype / "loss.json").read_text())["loss_per_step"]
        assert all(0 < loss < 2 for loss in losses)


def test_a_bf16_base_without_autocast(options, run_here, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        BASE, torch_dtype=torch.bfloat16, safety_checker=None
    )
    pipeline.save_pretrained(tmp_path / "bf16_base")
    more = ["--training_dtype=none", "--preview", "--sample.num_inference_steps=2"]
    assert run_here([*options, *more, f"--model.path={tmp_path / 'bf16_base'}"]) == 0


def test_wandb_runs_offline_and_keeps_no_secret(options, run_here, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc: no key
    more = ["--tracking.report_to=wandb", "--preview", "--sample.num_inference_steps=2",
            "--tracking.artifacts", "--sample.every=6",
            f"--data.validation_path={TWEMOJI / 'validation'}"]  # fmt: skip
    assert run_here([*options, *more]) == 0
    (log,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    assert b"hf_not_to_be_seen" not in log.read_bytes()
    read = written_records(log)
    seen = {
        item.key or ".".join(item.nested_key) for record in read for item in record.history.item
    }
    config = {item.key for record in read for item in record.config.update}
    assert {"train/loss", "train/lr", "train/grad_norm", "train/samples_per_second", "memory/host", "validation/loss",
            "validation/quantile_0.5", "preview/after.filenames"} <= seen  # fmt: skip
    assert {"learning_rate", "model.path"} <= config
    artifacts = {record.artifact.name for record in read}
    assert {"out-adapter", "out-samples"} <= artifacts
    assert [*(tmp_path / "out" / "wandb" / "artifacts" / "staging").iterdir()]


def test_tensorboard_gets_the_losses(options, run_here, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_here([*options, "--tracking.report_to=tensorboard"]) == 0
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*.0")
    log = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [3, 6]


def test_the_second_run_encodes_nothing_and_a_new_caption_one_row(
    options, run_here, images, tmp_path, capsys
):
    fresh = [*options, f"--data.cache_dir={tmp_path / 'cache'}"]
    assert run_here(fresh) == 0
    assert "encoded now: 4 images, 4 captions" in capsys.readouterr().out
    assert run_here([*fresh, f"--output_dir={tmp_path / 'second'}"]) == 0
    assert "encoded now: 0 images, 0 captions" in capsys.readouterr().out
    (images / "cat.txt").write_text("a cat of another kind")
    assert run_here([*fresh, f"--output_dir={tmp_path / 'third'}"]) == 0
    assert "encoded now: 0 images, 1 captions" in capsys.readouterr().out


def test_progress_bar_shows_loss_and_rate(options):
    result = script(options, COLUMNS="120", PYTHONUNBUFFERED="1")
    assert "6/6" in result.stderr
    assert "loss=" in result.stderr
    assert "lr=5.00e-04" in result.stderr
    assert os.linesep + "trainable" in result.stdout
