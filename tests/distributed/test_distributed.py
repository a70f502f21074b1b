"""Several processes are one run: the same samples, losses and adapter as one process, in every engine."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.project import BASE, TWEMOJI
from helpers.runs import assert_same_run, common, launched, samples
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_algos import ALGORITHMS
from training.reporting.status import read_status

pytestmark = pytest.mark.slow
VALIDATED = [f"--data.validation_path={TWEMOJI / 'validation'}"]
FOUR = ("LoRA", "LoHa", "LoKr", "OFT")
OTHERS = tuple(name for name in ALGORITHMS if name not in FOUR)
ENGINES = {"ddp": {2: FOUR, 4: ("LoRA",)}, "fsdp2": {2: FOUR}}
TOTAL = 4  # micro-batches per step, on however many processes


@pytest.fixture(scope="module")
def wide_images(tmp_path_factory) -> Path:
    """Images of three shapes, so that there are buckets."""
    folder = tmp_path_factory.mktemp("wide")
    for n, path in enumerate(sorted((TWEMOJI / "train").glob("*.png"))[:12]):
        image = Image.open(path).convert("RGB")
        image.resize([(64, 64), (96, 48), (48, 96)][n % 3]).save(folder / path.name)
        (folder / path.with_suffix(".txt").name).write_text(path.with_suffix(".txt").read_text())
    return folder


def save_assistant(folder: Path) -> Path:
    """Save a LoRA of the attention of the embedded base; return its path."""
    path, generator, tensors = (
        folder / "assistant.safetensors",
        torch.Generator().manual_seed(0),
        {},
    )
    for name, weight in load_file(BASE / "unet" / "diffusion_pytorch_model.safetensors").items():
        if name.endswith(".to_q.weight"):
            layer = name.removesuffix(".weight")
            rows, columns = weight.shape
            tensors[f"unet.{layer}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
            tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) / 10
    save_file(tensors, path)
    return path


def run_all(folder: Path, engine: str, processes: int, names: Iterable[str], wide: Path) -> Path:
    """Runs what is in `names`: algorithms, one run with `buckets` and previews, what works on whole `steps`, and that
    with a trained `text` encoder. Returns where they are."""
    accumulation, runs = f"--grad_accumulation_steps={TOTAL // processes}", []
    out, options = folder / f"{engine}-{processes}", common(folder / "cache")
    for algorithm in (name for name in names if name in ALGORITHMS):
        blocks = ["--adapter.block_size=28"] if algorithm in ("OFT", "BOFT") else []
        runs.append(
            [
                *options,
                f"--algorithm={algorithm}",
                f"--output_dir={out / algorithm}",
                accumulation,
                *blocks,
            ]
        )
    steps = ["--objective.stratified_timesteps", "--objective.noise_offset=0.1", "--ema.decay=0.9"]
    others = {
        "buckets": [f"--data.path={wide}", "--preview", "--sample.num_inference_steps=2", "--batch_size=2",
                    "--gradient_checkpointing", "--export.every=2", "--sample.grid=1"],
        "steps": steps,
        "text": [*steps, "--model.train_text_encoder"],
        "preserve": [*steps, "--objective.preserve.weight=0.5", "--objective.preserve.prompts=a face",
                     f"--model.assistant_lora={save_assistant(folder)}"],
    }  # fmt: skip
    if "slider" in names:
        slider = [
            "targets=a face",
            "positives=a happy face",
            "negatives=a sad face",
            "denoising_steps=2",
        ]
        runs.append(
            [
                *(option for option in options if not option.startswith("--data.path")),
                *(f"--objective.slider.{option}" for option in slider),
                f"--output_dir={out / 'slider'}",
                accumulation,
            ]
        )
    for name in (name for name in names if name in others):
        runs.append(
            [*options, *VALIDATED, *others[name], f"--output_dir={out / name}", accumulation]
        )
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    result = launched(engine, processes, str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{TOTAL // processes} x {processes} = {TOTAL} samples per step" in result.stdout
    return out


@pytest.mark.parametrize(
    ("processes", "algorithms"),
    [
        (1, FOUR),
        pytest.param(1, OTHERS, marks=pytest.mark.long),
        pytest.param(2, ("LoRA", "OFT"), marks=pytest.mark.long),
    ],
    ids=["1", "1-others", "2"],
)
def test_a_run_that_was_killed_is_the_run_that_was_not(
    processes, algorithms, wide_images, tmp_path
):
    """Bit for bit, for every algorithm, with accumulation and buckets; one of them three times in a row and with
    validation."""
    options = [*common(tmp_path / "cache"), f"--data.path={wide_images}", "--grad_accumulation_steps=2", "--steps=12",
               "--checkpoint.every=2", "--optim.lr_scheduler=cosine", "--optim.lr_warmup_steps=3"]  # fmt: skip
    runs, folders = [], {}
    for algorithm in algorithms:
        name = f"{algorithm}-5-6-9" if algorithm == "LoRA" else f"{algorithm}-5"
        blocks = ["--adapter.block_size=28"] if algorithm in ("OFT", "BOFT") else []
        here = [
            *options,
            f"--algorithm={algorithm}",
            *blocks,
            *(VALIDATED if algorithm == "LoRA" else []),
        ]
        runs += [[*here, f"--output_dir={tmp_path / algorithm}"]]
        runs += [[*here, f"--output_dir={tmp_path / name}"]] * len(name.split("-"))
        folders[tmp_path / algorithm] = tmp_path / name
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    result = launched("ddp", processes, str(tmp_path / "runs.json"), "abandons")
    assert result.returncode == 0, result.stdout + result.stderr
    more_kills = 2 if "LoRA" in algorithms else 0
    assert result.stdout.count("abandoned") == (len(algorithms) + more_kills) * processes
    assert result.stdout.count("resumed at step 4") == len(algorithms)
    for straight, killed in folders.items():
        assert samples(straight) == samples(killed)
        a, b = (load_file(folder / "lora.safetensors") for folder in (straight, killed))
        assert a.keys() == b.keys()
        assert all(torch.equal(tensor, b[name]) for name, tensor in a.items()), killed
        one, two = (json.loads((folder / "loss.json").read_text()) for folder in (straight, killed))
        assert one == two
        steps = [
            json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == sorted(set(steps))


@pytest.fixture(scope="module")
def alone(wide_images, tmp_path_factory) -> Path:
    """All that one process trains."""
    return run_all(
        tmp_path_factory.mktemp("alone"),
        "ddp",
        1,
        [*FOUR, "buckets", "steps", "text", "preserve", "slider"],
        wide_images,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_any_number_of_processes_is_the_same_run(engine, alone, wide_images, tmp_path):
    for processes, algorithms in ENGINES[engine].items():
        names = [
            *algorithms,
            "preserve",
            "slider",
            "buckets",
            "text" if engine == "ddp" else "steps",
        ]
        many = run_all(tmp_path, engine, processes, names, wide_images)
        for name in names:
            assert_same_run(alone / name, many / name)
        assert len(json.loads((many / names[-1] / "loss.json").read_text())["validation"]) == 2
        for picture in ("preview.png", "samples/lora-grid_00.png", "samples/lora-grid_03.png"):
            images = [
                np.asarray(Image.open(folder / "buckets" / picture), int)
                for folder in (alone, many)
            ]
            assert np.abs(images[0] - images[1]).max() <= 2, (
                "drawn by other ranks, with weights that differ by rounding"
            )
        status = read_status(many / "buckets")
        assert (status.state, status.num_processes) == ("finished", processes)
        assert (many / "buckets" / "report.html").is_file()


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_any_number_of_processes_trains_the_other_algorithms_alike(engine, wide_images, tmp_path):
    alone = run_all(tmp_path, "ddp", 1, OTHERS, wide_images)
    folder = tmp_path / "many"
    folder.mkdir()
    many = run_all(folder, engine, 2, OTHERS, wide_images)
    for name in OTHERS:
        assert_same_run(alone / name, many / name)
