"""Several processes of which one fails, is killed, hangs, is signalled or is another than it should be."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.project import BASE, PROJECT, RANKS, TWEMOJI, accelerate_launch
from helpers.runs import assert_same_adapter, launched, runs_file
from safetensors.torch import load_file

from training.reporting.status import read_status

pytestmark = pytest.mark.slow


@pytest.fixture
def small(options) -> list[str]:
    return [*options, "--batch_size=1", "--steps=12"]


def with_fault(
    fault: str, tmp_path: Path, argv: list[str], **environment: str
) -> subprocess.CompletedProcess:
    (tmp_path / "runs.json").write_text(json.dumps([argv]))
    return launched("ddp", 2, str(tmp_path / "runs.json"), fault, **environment)


NAMED = {
    "leaves_an_adapter_out": "the processes' gradients differ after they were averaged: down_blocks.1.attentions.0",
    "sees_the_same_samples": "all processes have the same gradients before they are averaged",
    "drifts": "the adapters are not the same in all processes: down_blocks.1.attentions.0",
}


@pytest.mark.parametrize(
    "fault",
    [
        "leaves_an_adapter_out",
        pytest.param("sees_the_same_samples", marks=pytest.mark.long),
        pytest.param("drifts", marks=pytest.mark.long),
    ],
)
def test_ranks_that_are_not_one_run_are_found_out(fault, small, tmp_path):
    result = with_fault(fault, tmp_path, small)
    assert result.returncode == 1
    assert NAMED[fault] in result.stderr
    assert result.stderr.count("error: ") == 1, "said by one rank"
    assert not (tmp_path / "out" / "lora.safetensors").exists()


def test_an_exception_on_one_rank_ends_all_within_seconds_and_is_said_once(small, tmp_path):
    started = time.monotonic()
    result = with_fault("raises", tmp_path, small)
    assert time.monotonic() - started < 60, "no timeout was waited for"
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "error: rank 1: Traceback" in result.stderr
    summary = result.stderr.split("Root Cause")[1]
    assert "ValueError: the disk of rank 1 is on fire" in summary, "last of all, torchrun names it"
    assert "Connection closed" not in result.stderr
    status = read_status(tmp_path / "out")
    assert status.state == "failed"
    assert "rank 1: ValueError: the disk of rank 1 is on fire" in status.message


def test_a_rank_that_hangs_ends_the_run_after_the_timeout(small, tmp_path):
    result = with_fault("hangs", tmp_path, [*small, "--distributed.timeout_minutes=0.1"])
    assert result.returncode == 1
    assert "Another process, its node or the network has failed" in result.stderr


DRAWN = ["--preview", "--sample.num_inference_steps=2", "--steps=2"]


def test_no_rank_waits_for_an_export_or_an_image_under_a_timeout(small, tmp_path):
    options = [*small, *DRAWN, "--distributed.timeout_minutes=0.1"]
    result = with_fault("is_slow_at_the_end", tmp_path, options, TEST_SECONDS="9")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert (tmp_path / "out" / "preview.png").is_file()


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.long), "fsdp2"])
def test_an_image_that_cannot_be_drawn_costs_the_preview_alone(engine, small, tmp_path):
    """With a sharded model rank 0 waits in the middle of an image for rank 1."""
    runs = runs_file(tmp_path, [*small, *DRAWN])
    result = launched(engine, 2, runs, "cannot_draw")
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert said.count("samples could not be drawn, and are left out") == 1
    assert "MemoryError: rank 1 has no memory left" in said
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert not (tmp_path / "out" / "preview.png").exists()


def test_prompts_of_a_sharded_model_may_need_different_numbers_of_passes(small, tmp_path):
    """All processes draw the same prompt: each pass gathers the weights from all of them."""
    prompts = ["--sample.prompts", "a cat --s 1", "an owl --s 3", "--sample.every=2", "--steps=2"]
    runs = runs_file(tmp_path, [*small, *prompts])
    result = launched("fsdp2", 2, runs)
    assert result.returncode == 0, result.stderr
    assert len([*(tmp_path / "out" / "samples").glob("*-step00000002_0*.png")]) == 2


def test_a_step_takes_one_collective_of_the_gradients_and_one_number(small, tmp_path):
    result = with_fault("counts_collectives", tmp_path, small)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "step 5: " in line)
    gradients = int(line.split(" of ")[1].split()[0])
    calls = json.loads(line.split("step 5: ")[1].split(" of ")[0].replace("'", '"'))
    assert {*calls} == {"all_reduce 8", f"all_reduce {gradients}"}
    assert calls.count(f"all_reduce {gradients}") == 1


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGUSR1],
    ids=lambda n: n.name,
)
def test_a_signal_on_one_rank_is_known_to_all(number, small, tmp_path):
    more = [*small, "--checkpoint.every=0"]
    result = with_fault(
        "gets_signal", tmp_path, more, TEST_SIGNAL=str(int(number)), SLURM_JOB_ID=""
    )
    saved = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    if number == signal.SIGUSR1:
        assert result.returncode == 0, result.stderr
        assert saved == ["step_00000005", "step_00000012"]
        return
    assert f"stopped by {number.name}: saved step 5 of 12" in result.stdout
    assert saved == ["step_00000005"]
    assert result.stderr.count("error: ") == 0
    status = read_status(tmp_path / "out")
    assert (status.state, status.step) == ("stopped", 5)
    assert status.message.startswith(f"{number.name}: saved step 5 of 12")


@pytest.mark.long
def test_a_dead_rank_restarts_the_group_which_goes_on_by_itself(small, tmp_path):
    straight = launched(
        "ddp", 2, runs_file(tmp_path, [*small, f"--output_dir={tmp_path / 'straight'}"])
    )
    assert straight.returncode == 0, straight.stderr
    command = [*accelerate_launch("--multi_gpu", "--num_machines=1", "--num_processes=2", "--main_process_port=0",
               "--max_restarts=2", "--rdzv_backend=c10d"), str(RANKS),
               runs_file(tmp_path, [*small, "--checkpoint.every=2", "--overwrite"]), "is_killed_once"]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    refused = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=env
    )
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in refused.stderr
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=env
    )
    assert result.returncode == 0, result.stderr
    assert "resumed at step 4 of 12" in result.stdout
    assert_same_adapter(tmp_path / "straight", tmp_path / "out")


def test_a_run_goes_on_with_fewer_and_with_more_processes(small, tmp_path):
    """The same command each time: 2 processes, then 1, then 4."""
    straight = [*small, f"--output_dir={tmp_path / 'straight'}", "--grad_accumulation_steps=4"]
    assert launched("ddp", 1, runs_file(tmp_path, straight)).returncode == 0
    elastic = [*small, "--grad_accumulation_steps=2"]
    for processes, steps, said in ((2, 4, "2 x 2 = 4"), (1, 8, "4 x 1 = 4"), (4, 12, "1 x 4 = 4")):
        result = launched("ddp", processes, runs_file(tmp_path, [*elastic, f"--steps={steps}"]))
        assert result.returncode == 0, result.stderr
        assert f"{said} samples per step" in result.stdout
    assert "the earlier steps had 4 micro-batches per step" in result.stdout
    one, two = (load_file(tmp_path / name / "lora.safetensors") for name in ("straight", "out"))
    for name in one:  # gradients are added in another order; measured: 4.7e-6
        difference = (two[name] - one[name]).norm() / one[name].norm()
        assert difference <= 5e-5, name
    refused = launched("ddp", 3, runs_file(tmp_path, [*elastic, "--steps=13"]))
    assert "micro-batches per step" in refused.stderr


KILLS = int(os.environ.get("KILLS", "5"))  # 20 take seven minutes


@pytest.mark.long
def test_a_storm_of_kills_costs_nothing(tmp_path, cache_dir):
    """Ranks and launchers die by SIGKILL at any moment; the same command always goes on by itself."""
    rng, killed, whole = random.Random(0), 0, 0
    moments: dict[str, int] = {}
    common = [
        f"--model.path={BASE}", f"--data.path={TWEMOJI / 'train'}", "--data.resolution=64", "--batch_size=1",
        f"--data.validation_path={TWEMOJI / 'validation'}", "--data.encode_batch_size=1", "--rank=4",
        "--training_dtype=fp32", "--lora_dtype=fp32", "--no_gradient_checkpointing", "--adapter.targets=attention",
        "--steps=60", "--checkpoint.every=4", "--validation.every=15", "--sample.num_inference_steps=8",
    ]  # fmt: skip
    command = [*accelerate_launch("--multi_gpu", "--num_machines=1", "--num_processes=2", "--main_process_port=0"),
               str(PROJECT / "train_lora.py")]  # fmt: skip

    def start(name: str) -> subprocess.Popen:
        argv = [
            *command,
            *common,
            f"--output_dir={tmp_path / name}",
            f"--data.cache_dir={tmp_path / name / 'cache'}",
        ]
        log = (tmp_path / f"{name}.log").open("ab")
        env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen(argv, stdout=log, stderr=log, env=env, start_new_session=True)

    assert start("straight").wait(300) == 0, (tmp_path / "straight.log").read_text()
    while killed < KILLS:
        name = f"storm{whole}"
        done = tmp_path / name / "preview.png"
        while not done.exists():
            process = start(name)
            if killed >= KILLS:
                wait(process, 300)
            elif rng.random() < 0.2:
                wait(process, rng.uniform(1, 8))  # while libraries load, mostly
            else:
                wait_for_output(process, tmp_path / f"{name}.log")
                wait(process, rng.uniform(0, 7))
            if process.poll() is None:
                moment = last_word(tmp_path / f"{name}.log")
                moments[moment] = moments.get(moment, 0) + 1
                os.kill(rng.choice([process.pid, *children(process.pid)]), signal.SIGKILL)
                killed += 1
            process.wait(120)
        assert_same_adapter(tmp_path / "straight", tmp_path / name)
        assert done.read_bytes() == (tmp_path / "straight" / "preview.png").read_bytes()
        one, two = (
            json.loads((tmp_path / n / "loss.json").read_text()) for n in ("straight", name)
        )
        assert one == two
        whole += 1
    print(f"{killed} kills in {whole} runs: {moments}")
    assert len(moments) >= 2, moments


def wait(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def wait_for_output(process: subprocess.Popen, log: Path) -> None:
    """Until this start of the run encodes or trains."""
    before = log.stat().st_size
    while process.poll() is None and not re.search(rb"encoding|model  ", log.read_bytes()[before:]):
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def last_word(log: Path) -> str:
    """What a run was at, roughly, from the last line of its log."""
    line = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1:] or [""]
    known = ("encoding", "step/s", "validation", "resumed", "wrote", "output")
    return next((word for word in known if word in line[0]), "start")
