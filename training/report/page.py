"""report.html: one file that shows a run, or compares several."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.text import public_text, public_value
from data.thumbnails import spread_evenly
from training.memory.config import GIB
from training.report.curves import Chart, comparison_charts, run_charts
from training.report.output_files import output_files, usage
from training.report.run_files import RunFiles
from training.report.sample_pictures import (
    GRID_SIDE,
    PictureCache,
    SampleSeries,
    sample_series,
)
from training.report.settings import (
    all_options,
    changed_options,
    option_differences,
    private_paths,
)
from training.reporting.events import ENDS
from training.run_folder import PREVIEW

ASSETS = Path(__file__).with_name("assets")
ASSET_NAMES = (
    "report.css",
    "report.js",
    "uPlot.min.css",
    "uPlot.iife.min.js",
    "uPlot.LICENSE",
)
PHASE_PEAK = "memory/gpu_peak_"
"""Start of the names of metrics with the peak of a phase."""
REFRESH_EVERY = 30
"""Seconds after which the page of a living run loads itself again."""
MAX_EVENTS = 200
TABLE_ROWS = 40
"""Rows of the table with the numbers of a chart."""
CONDITION_TEXTS = {
    "running": "running",
    "stalled": "stalled: the process lives, and trains no step",
    "dead": "dead: the process has ended without a word",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "unknown": "ended, or never started",
}


def run_page(run: RunFiles, pictures: PictureCache, folder: Path) -> str:
    """Return the page of a run. `folder`: of the page; its links are relative to it."""
    charts = run_charts(run)
    samples = sample_series(run, pictures, folder)
    public = public_of(run)
    is_alive = run.condition in ("running", "stalled")
    return render(
        "run.html",
        title=f"{run.name}: {run.adapter_name}",
        run=run,
        header=run_header(run),
        public=public,
        charts=charts,
        tables=[chart_table(chart) for chart in charts],
        samples=samples,
        preview=pictures.picture(run.folder / PREVIEW, GRID_SIDE),
        phases=phase_rows(run),
        events=shown_events(run),
        changed=changed_options(run),
        options=all_options(run),
        files=output_files(run, folder),
        usage=usage(run),
        data=page_data(charts, [samples], [run.name]),
        refresh_every=REFRESH_EVERY if is_alive else 0,
        written_at=run.read_at,
    )


def comparison_page(runs: Sequence[RunFiles], pictures: PictureCache, folder: Path) -> str:
    """Return a page that compares runs. `folder`: of the page."""
    labels = run_labels(runs)
    charts = comparison_charts(runs, labels)
    samples = [sample_series(run, pictures, folder) for run in runs]
    steps: set[int] = set()
    for series in samples:
        steps.update(series.steps)
    return render(
        "comparison.html",
        title=f"{len(runs)} runs",
        labels=labels,
        headers=[run_header(run) for run in runs],
        charts=charts,
        tables=[chart_table(chart) for chart in charts],
        samples=samples,
        steps=sorted(steps),
        rows=prompt_rows(samples),
        without_samples=labels_without_samples(labels, samples),
        differences=option_differences(runs),
        data=page_data(charts, samples, labels),
        refresh_every=0,
        written_at=max(run.read_at for run in runs),
    )


def prompt_rows(samples: Sequence[SampleSeries]) -> list[dict[str, Any]]:
    """Return a row for each prompt, with a cell for each run that has drawn it."""
    cells_of_text: dict[str, list[dict[str, Any]]] = {}
    for run_number, series in enumerate(samples):
        for number, prompt in enumerate(series.prompts):
            cell = {"run": run_number, "number": number, "prompt": prompt}
            cells_of_text.setdefault(prompt.text, [])
            cells_of_text[prompt.text].append(cell)
    rows = []
    for text, cells in cells_of_text.items():
        rows.append({"text": text, "cells": cells})
    return rows


def labels_without_samples(labels: Sequence[str], samples: Sequence[SampleSeries]) -> list[str]:
    """Return the labels of the runs that have drawn no samples."""
    without = []
    for label, series in zip(labels, samples, strict=True):
        if not series.prompts:
            without.append(label)
    return without


def run_labels(runs: Sequence[RunFiles]) -> list[str]:
    """Return a different label for each run: the name of its folder, or more of its path."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]


@cache
def environment() -> Environment:
    """Return the templates. Everything in them is escaped."""
    templates = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["time"] = time_text
    templates.filters["duration"] = duration_text
    return templates


@cache
def text_environment() -> Environment:
    """Return the templates of Markdown, in which nothing is escaped."""
    templates = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["code"] = code_span
    return templates


def code_span(text: str) -> str:
    """Return a text as code of Markdown, with fences that are longer than its own backticks."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if longest else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def render(template_name: str, **values: Any) -> str:
    """Return a template with its values. Styles and scripts are inside of the page."""
    template = environment().get_template(template_name)
    return template.render(assets=page_assets(), **values)


@cache
def page_assets() -> dict[str, str]:
    """Return the contents of the styles and scripts, by file name."""
    assets = {}
    for name in ASSET_NAMES:
        path = ASSETS / name
        assets[name] = path.read_text(encoding="utf-8")
    return assets


def public_of(run: RunFiles) -> Callable[[str], str]:
    """Return a function that takes the folders of the run's paths out of a text."""
    return partial(public_text, paths=private_paths(run))


def run_header(run: RunFiles) -> dict[str, Any]:
    """Return the values in the head of the page, by name."""
    validation: dict[int, float] = {}
    loss: float | None = None
    for row in run.rows:
        loss = row.get("train/loss", loss)
        if row.get("validation/loss") is not None:
            validation[row["step"]] = row["validation/loss"]
    best_step = min(validation, key=lambda step: validation[step], default=None)
    model = run.options["model"]
    return {
        **status_header(run),
        "name": run.name,
        "condition": run.condition,
        "condition_text": CONDITION_TEXTS[run.condition],
        "steps": run.options.get("steps"),
        "loss": loss,
        "first_validation": next(iter(validation.values()), None),
        "best_validation": None if best_step is None else validation[best_step],
        "best_step": best_step,
        "seconds": training_seconds(run),
        "algorithm": run.options.get("algorithm"),
        "rank": run.options.get("rank"),
        "model": public_value(str(model.get("path"))),
    }


def status_header(run: RunFiles) -> dict[str, Any]:
    """Return the values in the head of the page that status.json decides, by name."""
    status = run.status
    if status is None:
        return {"message": "", "step": run.last_step, "phase": "", "remaining": None}
    remaining: float | None = None
    if run.condition == "running":
        remaining = status.remaining_seconds
    public = public_of(run)
    message = public(status.message)
    return {
        "message": message,
        "step": status.step,
        "phase": status.phase,
        "remaining": remaining,
    }


def training_seconds(run: RunFiles) -> float | None:
    """Return the time that the processes of a run have taken, without the time between them."""
    total = 0.0
    last_time: float | None = None
    for event in run.events:
        if event["kind"] in ("started", "resumed"):
            last_time = event["time"]
        if last_time is None:
            continue
        total += max(0.0, event["time"] - last_time)
        last_time = event["time"]
        if event["kind"] in ENDS:
            last_time = None
    if last_time is not None and run.status is not None:
        total += max(0.0, run.status.updated_at - last_time)
    return total if run.events else None


def phase_rows(run: RunFiles) -> list[tuple[str, float | None, float | None]]:
    """Return for each phase its name, and its planned and its largest measured memory in GiB."""
    planned: dict[str, float] = {}
    for name, num_bytes in run.facts.get("planned_bytes", {}).items():
        planned[name] = num_bytes / GIB
    measured: dict[str, float] = {}
    for row in run.rows:
        for name in row:
            if name.startswith(PHASE_PEAK):
                phase = name.removeprefix(PHASE_PEAK).replace("_", " ")
                measured[phase] = row[name]
    rows = []
    for name in {**planned, **measured}:
        rows.append((name, planned.get(name), measured.get(name)))
    return rows


def shown_events(run: RunFiles) -> list[dict[str, Any]]:
    """Return the last events, the newest one first."""
    public = public_of(run)
    events = []
    last_events = run.events[-MAX_EVENTS:]
    for event in reversed(last_events):
        text = public(event["text"])
        events.append({**event, "text": text})
    return events


def chart_table(chart: Chart) -> list[list[str]]:
    """Return the numbers of a chart as rows of text, for readers who do not see it."""
    labels = [series.label for series in chart.series]
    rows = [[chart.x_label, *labels]]
    all_indices = np.arange(len(chart.x))
    for index in spread_evenly(all_indices, TABLE_ROWS):
        values = [number_text(series.values[index]) for series in chart.series]
        rows.append([f"{chart.x[index]:g}", *values])
    return rows


def number_text(value: float | None) -> str:
    """Return a number with four digits; empty without one."""
    if value is None:
        return ""
    return f"{value:.4g}"


def page_data(
    charts: Sequence[Chart], samples: Sequence[SampleSeries], labels: Sequence[str]
) -> dict[str, Any]:
    """Return the numbers and pictures that the script of the page reads."""
    runs = []
    for label, series in zip(labels, samples, strict=True):
        prompts = []
        for prompt in series.prompts:
            prompts.append({"pictures": prompt.pictures, "links": prompt.links})
        runs.append({"label": label, "steps": series.steps, "prompts": prompts})
    return {"charts": [asdict(chart) for chart in charts], "samples": runs}


def time_text(seconds: float) -> str:
    """Return seconds since the epoch as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration_text(seconds: float | None) -> str:
    """Return a duration as hours, minutes and seconds."""
    if seconds is None:
        return "-"
    whole_minutes, remaining_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(whole_minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {remaining_seconds} s"
    return f"{remaining_seconds} s"
