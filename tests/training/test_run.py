"""What goes wrong while a run is set up or going on: said clearly, and nothing is lost."""

import json
import os
import resource
import shutil
import sys
import threading

import pytest
import torch
import torch.distributed as dist
import yaml
from helpers.project import BASE, script
from safetensors.torch import load_file, save_file

from common.atomic import WriteError, new_folder, write_file
from training.checkpoints import storage
from training.config import OptimConfig
from training.optim.schedule import learning_rate


def test_an_output_dir_of_a_different_run_is_refused(options, run_here, tmp_path, capsys):
    assert run_here(options) == 0
    before = (tmp_path / "out" / "lora.safetensors").read_bytes()
    assert run_here([*options, "--rank=2", "--optim.eps=1e-7"]) == 2
    error = capsys.readouterr().err
    assert "rank is 4 there, 2 here" in error
    assert "optim.eps is None there, 1e-07 here" in error
    assert "--overwrite" in error
    assert (tmp_path / "out" / "lora.safetensors").read_bytes() == before
    assert run_here([*options, "--rank=2", "--optim.eps=1e-7", "--overwrite"]) == 0
    assert load_file(tmp_path / "out" / "lora.safetensors")["lora_unet_mid_block_attentions_0_transformer_blocks_0"
                                                            "_attn1_to_q.lora_down.weight"].shape[0] == 2  # fmt: skip


def test_what_does_not_change_the_training_may_change(options, run_here, tmp_path, capsys):
    assert run_here(options) == 0
    longer = ["--steps=8", "--tracking.log_every=1", "--checkpoint.keep=5", "--export.name=other"]
    assert run_here([*options, *longer]) == 0
    assert "resumed at step 6 of 8" in capsys.readouterr().out
    assert (tmp_path / "out" / "other.safetensors").is_file()


def test_no_resume_will_not_lose_a_run(options, run_here, capsys):
    assert run_here(options) == 0
    assert run_here([*options, "--resume=never"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run_here([*options, "--resume=never", "--overwrite"]) == 0
    assert "resumed" not in capsys.readouterr().out


def test_changed_data_or_total_batch_is_refused_on_resume(options, run_here, images, capsys):
    assert run_here(options) == 0
    assert run_here([*options, "--steps=8", "--grad_accumulation_steps=2"]) == 2
    assert "micro-batches per step" in capsys.readouterr().err
    (images / "cat.txt").write_text("changed")
    assert run_here([*options, "--steps=8"]) == 2
    error = capsys.readouterr().err
    assert "images, captions or other data have changed" in error
    assert "Choose another --output_dir" in error


def test_a_damaged_checkpoint_is_passed_over(options, run_here, tmp_path, capsys):
    assert run_here([*options, "--checkpoint.every=2", "--checkpoint.keep=3"]) == 0
    folder = tmp_path / "out" / "checkpoints"
    newest, middle = folder / "step_00000006", folder / "step_00000004"
    (newest / "manifest.json").unlink()
    data = bytearray((middle / "optimizer.pt").read_bytes())
    data[-1] ^= 1
    (middle / "optimizer.pt").write_bytes(data)
    assert run_here(options) == 0
    out = capsys.readouterr().out
    assert "step_00000006 is incomplete" in out
    assert "step_00000004 is damaged (optimizer.pt)" in out
    assert "resumed at step 2 of 6" in out


def test_a_damaged_later_checkpoint_pushes_no_valid_one_out(tmp_path):
    for step in (2, 4, 6):
        storage.save(tmp_path, step, {"state.json": b"{}"}, keep=2)
    (tmp_path / "step_00000006" / "manifest.json").unlink()
    (tmp_path / "step_00000004" / "state.json").unlink()
    storage.save(tmp_path, 3, {"state.json": b"{}"}, keep=1)
    found, damaged = storage.load_newest(tmp_path)
    assert (found.step, len(damaged)) == (3, 2)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    files = {"adapter.safetensors": b"a" * 1000, "state.json": b"{}"}
    storage.save(tmp_path, 1, files, keep=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (5000, limit[1])
    )  # what a full disk does: write() fails midway
    try:
        with pytest.raises(storage.CheckpointError, match="step_00000001"):
            storage.save(tmp_path, 2, {**files, "optimizer.pt": b"o" * 10000}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    found, damaged = storage.load_newest(tmp_path)
    assert (found.step, found.files, damaged) == (1, files, [])


def test_a_run_on_a_full_disk_ends_with_1_and_goes_on_later(options, tmp_path):
    more = [*options, "--checkpoint.every=2", "--rank=16", "--adapter.targets=all"]
    assert script([*more, "--steps=2"]).returncode == 0
    launcher = [sys.executable, "-c", FULL_DISK]
    result = script(more, launcher)
    assert result.returncode == 1, result.stderr
    assert "could not be written" in result.stderr
    assert "step_00000002" in result.stderr
    assert "Traceback" not in result.stderr
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step_00000002"]
    assert "resumed at step 2 of 6" in script(more).stdout


FULL_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run(
    options, run_here, tmp_path, capsys, monkeypatch, value
):
    from training.loss import LossFunction

    original, calls = LossFunction.__call__, []

    def broken(self, denoiser, batch):
        calls.append(batch)
        loss = original(self, denoiser, batch)
        return loss * float(value) if len(calls) == 5 else loss

    monkeypatch.setattr(LossFunction, "__call__", broken)
    assert run_here([*options, "--steps=20", "--checkpoint.every=2"]) == 1
    error = capsys.readouterr().err
    assert "step 5 is not finite" in error
    assert "last good checkpoint" in error
    assert "step_00000004" in error
    names = error.split("its samples: ")[1].splitlines()[0].split(", ")
    assert len(names) == 2
    assert {name.split(".")[1] for name in names} == {"png"}
    assert len(calls) <= 6, "within one logging interval"
    assert [p.name for p in sorted((tmp_path / "out" / "checkpoints").iterdir())] == [
        "step_00000002",
        "step_00000004",
    ]
    assert not (tmp_path / "out" / "lora.safetensors").exists()


def test_a_lora_that_does_not_fit_lists_names_and_shapes(options, run_here, tmp_path, capsys):
    assert run_here(options) == 0
    tensors = load_file(tmp_path / "out" / "lora.safetensors")
    bad = {name.replace("mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "middle"): tensor
           for name, tensor in tensors.items()}  # fmt: skip
    down = next(name for name in bad if "down_blocks" in name and name.endswith("lora_down.weight"))
    bad[down] = torch.zeros(4, 7)
    save_file(bad, tmp_path / "bad.safetensors")
    arguments = [
        *options,
        f"--existing_lora={tmp_path / 'bad.safetensors'}",
        f"--output_dir={tmp_path / 'on'}",
    ]
    assert run_here(arguments) == 2
    error = capsys.readouterr().err
    assert "lora_unet_middle.lora_up.weight" in error
    assert "(4, 7)" in error
    (tmp_path / "text.safetensors").write_text("no tensors")
    arguments[-2] = f"--existing_lora={tmp_path / 'text.safetensors'}"
    assert run_here(arguments) == 2
    assert "not a readable .safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "on").exists()


def test_targets_that_match_nothing_end_the_run(options, run_here, tmp_path, capsys):
    assert run_here([*options, "--adapter.targets", "atention", "conv_in"]) == 2
    assert "atention: matches no layer; did you mean attention" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_a_users_error(options, run_here, tmp_path, capsys):
    shutil.copytree(BASE, tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "config.json").unlink()
    assert run_here([*options, f"--model.path={tmp_path / 'broken'}"]) == 2
    assert "could not be loaded" in capsys.readouterr().err


def test_conflicting_precision_is_refused(options, run_here, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_here(options) == 2
    assert "mixed_precision bf16, but training_dtype is fp32" in capsys.readouterr().err


def test_processes_that_do_not_find_each_other_are_refused(options, run_here, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_here(options) == 2
    assert "each would train on its own" in capsys.readouterr().err


def test_config_yaml_is_the_resolved_config(options, run_here, tmp_path):
    assert run_here(options) == 0
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (written["rank"], written["model"]["path"], written["seed"]) == (4, str(BASE), 0)
    assert "overwrite" not in written


def test_files_and_folders_are_there_whole_or_not_at_all(tmp_path):
    write_file(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_file(tmp_path / "a", 3)
    assert (tmp_path / "a").read_text() == "old"

    def fill(name: str) -> None:
        with new_folder(tmp_path / "folder") as beside:
            (beside / name).write_text("x")
            if name == "bad":
                raise OSError("no space left")

    fill("first")
    with pytest.raises(WriteError, match="folder could not be written: no space left"):
        fill("bad")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["first"]
    fill("second")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["second"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".f")]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rates_are_functions_of_the_step(schedule, expected):
    config = OptimConfig(lr_scheduler=schedule, lr_warmup_steps=2)
    rates = [learning_rate(step, 3.0, 6, config) for step in range(6)]
    assert rates == pytest.approx([1, 2, *(3 * e for e in expected)], abs=1e-5)


def test_a_rate_for_the_size_of_a_step(options, run_here, tmp_path, capsys):
    for how, rate in (("none", 5e-4), ("linear", 2e-3), ("sqrt", 1e-3)):
        more = [
            f"--optim.scale_lr={how}",
            "--grad_accumulation_steps=2",
            f"--output_dir={tmp_path / how}",
        ]
        assert run_here([*options, *more]) == 0
        rows = [
            json.loads(line) for line in (tmp_path / how / "metrics.jsonl").read_text().splitlines()
        ]
        assert [row["train/lr"] for row in rows] == pytest.approx([rate, rate])
        said = "rate        learning_rate x " in capsys.readouterr().out
        assert said == (how != "none")


def test_a_checkpoint_of_other_options_is_refused_without_the_config_file_too(
    options, run_here, tmp_path, capsys
):
    assert run_here(options) == 0
    (tmp_path / "out" / "config.yaml").unlink()
    assert run_here([*options, "--steps=8", "--optim.eps=1e-7"]) == 2
    assert "the options have changed" in capsys.readouterr().err
    assert run_here([*options, "--steps=8", "--tracking.log_every=2"]) == 0


def test_loss_json_holds_numbers_only(options, run_here, tmp_path):
    assert run_here([*options, "--steps=1", "--grad_accumulation_steps=2"]) == 0
    losses = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert losses["loss_per_step"] == [pytest.approx(sum(losses["loss_per_micro_step"]) / 2)]
    assert len(losses["loss_per_micro_step"]) == 2
    assert losses["validation"] == []


def test_fewer_steps_than_there_are_is_a_mistake(options, run_here, capsys):
    assert run_here(options) == 0
    assert run_here([*options, "--steps=5"]) == 2
    assert "is already at step 6" in capsys.readouterr().err


def test_another_course_of_the_learning_rate_is_said(options, run_here, capsys):
    linear = [*options, "--optim.lr_scheduler=linear"]
    assert run_here(linear) == 0
    assert run_here([*linear, "--steps=8"]) == 0
    assert (
        "note: --steps was 6 and is 8: the linear learning rate is that of 8 steps from here on"
        in capsys.readouterr().out
    )


def test_broken_records_stop_no_run(options, run_here, tmp_path):
    assert run_here(options) == 0
    with (tmp_path / "out" / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"a": 2}\n\xff\xfe\nnull\n{"step": 9')
    (tmp_path / "out" / "tracker.json").write_text('{"id": "x", "sent": null}')
    assert run_here([*options, "--steps=8"]) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [3, 6, 8]


def test_what_killed_saves_left_is_removed_by_the_next(tmp_path):
    for name in (".step_00000002.partial", ".step_00000001.old"):
        (tmp_path / name).mkdir()
    storage.save(tmp_path, 3, {"state.json": b"{}"}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_a_failed_process_leaves_the_group_in_bounded_time(monkeypatch):
    """NCCL may wait forever for the others; gloo never does."""
    from training import run

    class Left(Exception):
        pass

    def leave(exit_code: int) -> None:
        raise Left(exit_code)

    is_over = threading.Event()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", is_over.wait)
    monkeypatch.setattr(run, "LEAVE_TIMEOUT", 0.05)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match="1"):
        run.leave_process_group(1)
    is_over.set()
    run.leave_process_group(1)
