"""Folders that look like those of runs, for reports and for `status`."""

import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import yaml
from PIL import Image

from training.config import TrainConfig, to_dict
from training.reporting.status import Status


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, num_rows: int = 20, log_every: int = 10, **options: Any) -> Path:
    """A run without samples; its loss falls to half, with one peak in the middle."""
    folder.mkdir(parents=True)
    config = to_dict(TrainConfig()) | {"steps": num_rows * log_every} | options
    config["tracking"]["log_every"] = log_every
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    rows = []
    for index in range(num_rows):
        loss = 1 - index / (2 * num_rows)
        if index == num_rows // 2:
            loss = 7.0
        row = {
            "step": (index + 1) * log_every,
            "train/loss": loss,
            "train/lr": 1e-4,
            "train/grad_norm": 0.5,
            "train/samples_per_second": 3.0,
            "train/data_wait": 0.01,
            "memory/host": 2.5,
        }
        rows.append(row)
    write_lines(folder / "metrics.jsonl", rows)
    return folder


def write_samples(folder: Path, steps: list[int], num_prompts: int = 2, side: int = 64) -> None:
    """Samples of one color each: red tells the step, green the prompt."""
    (folder / "samples").mkdir(exist_ok=True)
    for position, step in enumerate(steps):
        for number in range(num_prompts):
            color = (20 * position, 100 * number, 0)
            path = folder / "samples" / f"lora-step{step:08d}_{number:02d}.png"
            Image.new("RGB", (side, side), color).save(path)


def write_facts(folder: Path, prompts: list[str], **facts: Any) -> None:
    """report.json with prompts."""
    entries = [
        {
            "text": text,
            "negative": None,
            "width": 64,
            "height": 64,
            "seed": number,
            "num_inference_steps": 8,
            "guidance_scale": 3.0,
            "strength": 1.0,
        }
        for number, text in enumerate(prompts)
    ]
    content = {"prompts": entries, "noise_levels": [0.05] * 20, **facts}
    (folder / "report.json").write_text(json.dumps(content), encoding="utf-8")


def status_of_this_process(**changes: Any) -> Status:
    """The status of a run that this process trains."""
    now = time.time()
    values: dict[str, Any] = {
        "state": "running",
        "phase": "train",
        "step": 40,
        "steps": 100,
        "steps_per_second": 2.0,
        "loss": 0.25,
        "gpu_gib": 7.5,
        "message": "",
        "num_processes": 1,
        "pid": os.getpid(),
        "pid_started_at": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "started_at": now - 60,
        "progress_at": now,
        "updated_at": now,
        "has_stepped": True,
    }
    return Status(**{**values, **changes})


def write_status(folder: Path, **changes: Any) -> Path:
    """A folder with a status."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(status_of_this_process(**changes)))
    (folder / "status.json").write_text(text, encoding="utf-8")
    return folder
