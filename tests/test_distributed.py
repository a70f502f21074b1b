"""Several processes are one run: the same samples, losses and adapter as one process, in every engine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, PROJECT, TWEMOJI
from PIL import Image
from safetensors.torch import load_file

from lora_algos import ALGORITHMS

pytestmark = pytest.mark.slow
CONFIGS = PROJECT / "accelerate_configs"
VALIDATED = [f"--data.validation_images={TWEMOJI / 'validation'}"]
FOUR = ("LoRA", "LoHa", "LoKr", "OFT")
ENGINES = {"ddp": {2: ALGORITHMS, 4: FOUR}, "fsdp2": {2: ALGORITHMS}}
TOTAL = 4  # micro-batches per step, on however many processes


def launched(config: str, processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs tests/ranks.py under one of the shipped configs, on CPUs."""
    command = [
        str(Path(sys.executable).parent / "accelerate"), "launch", f"--config_file={CONFIGS / config}.yaml",
        f"--num_processes={processes}", str(PROJECT / "tests" / "ranks.py"), *arguments,
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=env)


def common(cache_dir: Path) -> list[str]:
    return [
        f"--model.path={BASE}", f"--data.images={TWEMOJI / 'train'}", f"--data.cache_dir={cache_dir}",
        "--data.resolution=64", "--batch_size=1", "--rank=4",
        "--training_dtype=fp32", "--lora_dtype=fp32", "--no_gradient_checkpointing", "--preview.no_enabled",
        "--adapter.targets=attention", "--tracking.log_every=3", "--steps=3", "--tracking.samples",
        "--optim.eps=1e-5",  # with 1e-8 Adam makes a whole step of gradients that are nothing but rounding
    ]  # fmt: skip


@pytest.fixture(scope="module")
def wide_images(tmp_path_factory) -> Path:
    """Images of three shapes, so that there are buckets."""
    folder = tmp_path_factory.mktemp("wide")
    for n, path in enumerate(sorted((TWEMOJI / "train").glob("*.png"))[:12]):
        image = Image.open(path).convert("RGB")
        image.resize([(64, 64), (96, 48), (48, 96)][n % 3]).save(folder / path.name)
        (folder / path.with_suffix(".txt").name).write_text(path.with_suffix(".txt").read_text())
    return folder


def run_all(folder: Path, engine: str, processes: int, names: Iterable[str], wide: Path) -> Path:
    """Runs what is in `names`: algorithms, one run with `buckets` and previews, what works on whole `steps`, and that
    with a trained `text` encoder. Returns where they are."""
    accumulation, runs = f"--grad_accumulation_steps={TOTAL // processes}", []
    out, options = folder / f"{engine}-{processes}", common(folder / "cache")
    for algorithm in (name for name in names if name in ALGORITHMS):
        blocks = ["--adapter.block_size=28"] if algorithm in ("OFT", "BOFT") else []
        runs.append([*options, f"--algorithm={algorithm}", f"--output_dir={out / algorithm}", accumulation, *blocks])
    steps = ["--objective.stratified", "--objective.noise_offset=0.1", "--ema.decay=0.9"]
    others = {
        "buckets": [f"--data.images={wide}", "--preview.enabled", "--preview.num_inference_steps=2", "--batch_size=2",
                    "--gradient_checkpointing"],
        "steps": steps,
        "text": [*steps, "--model.train_text_encoder"],
    }  # fmt: skip
    for name in (name for name in names if name in others):
        runs.append([*options, *VALIDATED, *others[name], f"--output_dir={out / name}", accumulation])
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    result = launched(engine, processes, str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{TOTAL // processes} x {processes} = {TOTAL} samples per step" in result.stdout
    return out


def samples(folder: Path) -> list[dict]:
    rows = [json.loads(line) for path in folder.glob("samples/*.jsonl") for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["visit"])


@pytest.mark.parametrize(("processes", "algorithms"), [(1, ALGORITHMS), (2, FOUR)], ids=["1", "2"])
def test_a_run_that_was_killed_is_the_run_that_was_not(processes, algorithms, wide_images, tmp_path):
    """Bit for bit, for every algorithm, with accumulation and buckets; one of them three times in a row and with
    validation."""
    options = [*common(tmp_path / "cache"), f"--data.images={wide_images}", "--grad_accumulation_steps=2", "--steps=12",
               "--checkpoint.every=2", "--optim.lr_schedule=cosine", "--optim.warmup_steps=3"]  # fmt: skip
    runs, folders = [], {}
    for algorithm in algorithms:
        name = f"{algorithm}-5-6-9" if algorithm == "LoRA" else f"{algorithm}-5"
        blocks = ["--adapter.block_size=28"] if algorithm in ("OFT", "BOFT") else []
        here = [*options, f"--algorithm={algorithm}", *blocks, *(VALIDATED if algorithm == "LoRA" else [])]
        runs += [[*here, f"--output_dir={tmp_path / algorithm}"]]
        runs += [[*here, f"--output_dir={tmp_path / name}"]] * len(name.split("-"))
        folders[tmp_path / algorithm] = tmp_path / name
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    result = launched("ddp", processes, str(tmp_path / "runs.json"), "abandons")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("abandoned") == (len(algorithms) + 2) * processes
    assert result.stdout.count("resumed at step 4") == len(algorithms)
    for straight, killed in folders.items():
        assert samples(straight) == samples(killed)
        a, b = (load_file(folder / "lora.safetensors") for folder in (straight, killed))
        assert a.keys() == b.keys()
        assert all(torch.equal(tensor, b[name]) for name, tensor in a.items()), killed
        one, two = (json.loads((folder / "loss.json").read_text()) for folder in (straight, killed))
        assert one == two
        steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))


def assert_same_run(one: Path, many: Path, tolerance: float = 1e-5) -> None:
    assert samples(one) == samples(many) != []
    a, b = (json.loads((folder / "loss.json").read_text()) for folder in (one, many))
    for what in ("loss_per_micro_step", "loss_per_step", "gradient_norm_per_step"):
        assert b[what] == pytest.approx(a[what], rel=1e-5), what
    assert [entry["loss"] for entry in b["validation"]] == pytest.approx([e["loss"] for e in a["validation"]], 1e-5)
    x, y = (load_file(folder / "lora.safetensors") for folder in (one, many))
    assert x.keys() == y.keys()
    whole, other = (torch.cat([t[key].flatten() for key in sorted(t)]) for t in (x, y))
    assert (whole - other).norm() <= tolerance * whole.norm()


@pytest.fixture(scope="module")
def alone(wide_images, tmp_path_factory) -> Path:
    """All that one process trains."""
    return run_all(tmp_path_factory.mktemp("alone"), "ddp", 1, [*ALGORITHMS, "buckets", "steps", "text"], wide_images)


@pytest.mark.parametrize("engine", ENGINES)
def test_any_number_of_processes_is_the_same_run(engine, alone, wide_images, tmp_path):
    for processes, algorithms in ENGINES[engine].items():
        names = [*algorithms, "buckets", "text" if engine == "ddp" else "steps"]
        many = run_all(tmp_path, engine, processes, names, wide_images)
        for name in names:
            assert_same_run(alone / name, many / name)
        assert len(json.loads((many / names[-1] / "loss.json").read_text())["validation"]) == 2
        images = [np.asarray(Image.open(folder / "buckets" / "preview.png"), int) for folder in (alone, many)]
        assert np.abs(images[0] - images[1]).max() <= 2, "drawn by other ranks, with weights that differ by rounding"
