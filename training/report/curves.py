"""The charts of a report, as numbers."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.report.run_files import RunFiles
from training.reporting.loss_files import json_numbers, smoothed

MAX_POINTS = 1500
"""Points of a curve. Of longer curves, the smallest and the largest value of each stretch stay."""
SMOOTHED_SHARE = 20
"""The smoothed curve has the span of the run divided by this."""
TRAIN_LOSS = "train/loss"
VALIDATION_LOSS = "validation/loss"
NOISE_LEVEL = "validation/quantile_"
"""Start of the names of metrics with the validation loss at one noise level."""
MARKED_KINDS = ("resumed", "killed", "stopped", "failed")
"""Events that charts show."""
GPU_PEAK = "memory/gpu_peak"


@dataclass(frozen=True)
class Series:
    """A curve, or bars. None: there is no value at this x."""

    label: str
    values: list[float | None]
    is_faint: bool = False
    """Drawn thin and pale, behind the others."""
    has_points: bool = False
    """Drawn with its points, because they are few."""


@dataclass(frozen=True)
class Chart:
    """A chart with one x axis."""

    id: str
    title: str
    note: str
    """One sentence that says what it shows."""
    x: Sequence[float]
    series: list[Series]
    x_label: str = "step"
    unit: str = ""
    is_logarithmic: bool = False
    are_bars: bool = False
    marks: list[tuple[int, str]] = field(default_factory=list)
    """Steps with what happened there: the run was resumed, or killed."""


@dataclass(frozen=True)
class MetricChart:
    """A chart of some metrics."""

    id: str
    title: str
    note: str
    labels: dict[str, str]
    """Name of a metric -> name of its curve."""
    unit: str = ""
    scale: float = 1
    """Factor on the values."""
    is_logarithmic: bool = False


RATE = MetricChart(
    "rate", "Learning rate", "The peak is learning_rate.", {"train/lr": "learning rate"}
)
NORM = MetricChart(
    "norm",
    "Gradient norm",
    "Before clipping to optim.max_grad_norm, at the logged steps. Peaks are hard batches; a rise to the "
    "end means that the learning rate is too high.",
    {"train/grad_norm": "gradient norm"},
    is_logarithmic=True,
)
SPEED = MetricChart(
    "speed",
    "Speed",
    "Samples per second of all processes, without the time that drawing samples takes.",
    {"train/samples_per_second": "samples per second"},
)
WAIT = MetricChart(
    "wait",
    "Waiting for data",
    "Share of the training time in which the device waits for the next batch.",
    {"train/data_wait": "share"},
    unit="%",
    scale=100,
)
HOST_MEMORY = MetricChart(
    "memory", "Memory", "Of the main process.", {"memory/host": "host"}, unit="GiB"
)
GPU_MEMORY = MetricChart(
    "memory",
    "Memory",
    "Of the main process. The peak is the largest so far.",
    {GPU_PEAK: "GPU, peak", "memory/gpu": "GPU, now", "memory/host": "host"},
    unit="GiB",
)


MEASURES = MetricChart(
    "measures",
    "Samples against the data and the base model",
    "Rough numbers, means over the prompts. Nearest image: distance to the nearest training image, as a "
    "multiple of the usual distance between training images; near 0 they are copies. Contrast and "
    "saturation: relative to the samples at step 0 (sample.at_start); a steady rise means burned colors.",
    {
        "samples/nearest_image": "nearest image",
        "samples/contrast": "contrast",
        "samples/saturation": "saturation",
    },
)
CLIP_SCORE = MetricChart(
    "clip",
    "Samples against their prompts",
    "100 x the cosine of image and prompt in sample.score_model, the mean over the prompts. Overtrained "
    "adapters follow prompts less.",
    {"samples/clip_score": "CLIP score"},
)
COMPARED = {
    "loss": ("Training loss", "Smoothed over a twentieth of each run."),
    "validation": (
        "Validation loss",
        "Comparable if the runs have the same held-out images, noise levels and kind of model.",
    ),
    RATE.id: (RATE.title, ""),
    SPEED.id: (SPEED.title, SPEED.note),
}
"""Title and note of the charts that compare runs."""


def run_charts(run: RunFiles) -> list[Chart]:
    """Return the charts of a run that have points."""
    memory = HOST_MEMORY
    if any(GPU_PEAK in row for row in run.rows):
        memory = GPU_MEMORY
    charts = [
        loss_chart(run),
        validation_chart(run),
        metric_chart(run, RATE),
        metric_chart(run, NORM),
        metric_chart(run, SPEED),
        metric_chart(run, WAIT),
        metric_chart(run, memory),
        metric_chart(run, MEASURES),
        metric_chart(run, CLIP_SCORE),
        noise_chart(run),
    ]
    return [chart for chart in charts if chart.x]


def loss_chart(run: RunFiles) -> Chart:
    """Return the training loss, raw and smoothed."""
    steps, losses = column(run.rows, TRAIN_LOSS)
    chosen = thinned(losses)
    log_every = run.options["tracking"].get("log_every")
    label = f"mean of {log_every} steps"
    if log_every == 1:
        label = "each step"
    span = max(1, len(losses) // SMOOTHED_SHARE)
    raw = Series(label, pick(losses, chosen), is_faint=span > 1)
    series = [raw]
    if span > 1:
        smooth = json_numbers(smoothed(with_nan(losses).tolist(), span))
        series.append(Series(f"smoothed over {span} logs", pick(smooth, chosen)))
    return Chart(
        id="loss",
        title="Training loss",
        note="It is noisy, because each step has other noise levels: the validation loss says more.",
        x=pick(steps, chosen),
        series=series,
        marks=run_marks(run),
    )


def validation_chart(run: RunFiles) -> Chart:
    """Return the validation loss, in total and at each noise level."""
    rows = [row for row in run.rows if VALIDATION_LOSS in row]
    steps, losses = column(rows, VALIDATION_LOSS)
    chosen = thinned(losses)
    series = [Series("all noise levels", pick(losses, chosen), has_points=True)]
    for name in rows[0] if rows else ():
        if not name.startswith(NOISE_LEVEL):
            continue
        label = "noise level " + name.removeprefix(NOISE_LEVEL)
        values = [number(row.get(name)) for row in rows]
        level = Series(label, pick(values, chosen), is_faint=True, has_points=True)
        series.append(level)
    return Chart(
        id="validation",
        title="Validation loss",
        note="Mean squared error on held-out images at fixed noise. Noise level 0 is clean, 1 is noise. A "
        "rise at low levels while high ones still fall is the start of overfitting.",
        x=pick(steps, chosen),
        series=series,
        is_logarithmic=True,
        marks=run_marks(run),
    )


def metric_chart(run: RunFiles, chart: MetricChart) -> Chart:
    """Return the curves of a chart of metrics, without those that have no value."""
    labels = {}
    for name, label in chart.labels.items():
        if any(name in row for row in run.rows):
            labels[name] = label
    rows = [row for row in run.rows if not labels.keys().isdisjoint(row)]
    steps = [row["step"] for row in rows]
    main_metric = next(iter(labels), "")
    main_values = [number(row.get(main_metric)) for row in rows]
    chosen = thinned(main_values)
    has_points = len(rows) < SMOOTHED_SHARE
    series = []
    for name, label in labels.items():
        values = [number(row.get(name), chart.scale) for row in rows]
        series.append(Series(label, pick(values, chosen), has_points=has_points))
    return Chart(
        id=chart.id,
        title=chart.title,
        note=chart.note,
        x=pick(steps, chosen),
        series=series,
        unit=chart.unit,
        is_logarithmic=chart.is_logarithmic,
        marks=run_marks(run),
    )


def noise_chart(run: RunFiles) -> Chart:
    """Return the share of the samples that is trained at each noise level."""
    shares = run.facts.get("noise_levels", [])
    num_bins = len(shares)
    x = []
    for index in range(num_bins):
        middle = (index + 0.5) / num_bins
        x.append(middle)
    percent = [number(share, 100) for share in shares]
    return Chart(
        id="noise",
        title="Noise levels in training",
        note="Share of the samples at each noise level that follows from objective.timestep_sampling and "
        "the shift. 0 is clean, 1 is noise.",
        x=x,
        series=[Series("share", percent)],
        x_label="noise level",
        unit="%",
        are_bars=True,
    )


Curve = dict[int, float | None]
"""Step -> value."""


def comparison_charts(runs: Sequence[RunFiles], labels: Sequence[str]) -> list[Chart]:
    """Return charts with a curve of each run. `labels`: of the runs."""
    readers: dict[str, Callable[[RunFiles], Curve]] = {
        "loss": loss_curve,
        "validation": metric_curve(VALIDATION_LOSS),
        RATE.id: metric_curve("train/lr"),
        SPEED.id: metric_curve("train/samples_per_second"),
    }
    charts = []
    for chart_id, curve_of in readers.items():
        curves: dict[str, Curve] = {}
        for run, label in zip(runs, labels, strict=True):
            curves[label] = curve_of(run)
        chart = overlaid(chart_id, curves)
        if chart.x:
            charts.append(chart)
    return charts


def overlaid(chart_id: str, curves: dict[str, Curve]) -> Chart:
    """Return a chart with the curve of each label, over all their steps."""
    title, note = COMPARED[chart_id]
    all_steps: set[int] = set()
    for curve in curves.values():
        all_steps.update(curve)
    steps = sorted(all_steps)
    series = []
    for label, curve in curves.items():
        if not curve:
            continue
        has_points = len(curve) < SMOOTHED_SHARE
        values = [curve.get(step) for step in steps]
        labeled = Series(label, values, has_points=has_points)
        series.append(labeled)
    return Chart(chart_id, title, note, steps, series)


def loss_curve(run: RunFiles) -> Curve:
    """Return the smoothed training loss."""
    chart = loss_chart(run)
    smooth = chart.series[-1]
    steps = [int(step) for step in chart.x]
    losses = smooth.values
    points = zip(steps, losses, strict=True)
    return dict(points)


def metric_curve(name: str) -> Callable[[RunFiles], Curve]:
    """Return a function that reads a metric of a run as a curve."""

    def read(run: RunFiles) -> Curve:
        steps, values = column(run.rows, name)
        chosen = thinned(values)
        chosen_steps = pick(steps, chosen)
        chosen_values = pick(values, chosen)
        points = zip(chosen_steps, chosen_values, strict=True)
        return dict(points)

    return read


def column(rows: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float | None]]:
    """Return the steps that have a metric, and its values."""
    steps: list[int] = []
    values: list[float | None] = []
    for row in rows:
        if name not in row:
            continue
        step = row["step"]
        value = number(row[name])
        steps.append(step)
        values.append(value)
    return steps, values


def run_marks(run: RunFiles) -> list[tuple[int, str]]:
    """Return the steps at which the run ended or was resumed."""
    marks = []
    for event in run.events:
        kind = event["kind"]
        if kind in MARKED_KINDS:
            mark = event["step"], kind
            marks.append(mark)
    return marks


def number(value: Any, scale: float = 1) -> float | None:
    """Return a finite number, rounded to six digits, which charts do not show; else None."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{scale * value:.6g}")


def thinned(values: Sequence[float | None]) -> list[int]:
    """Return the indices of the values that are drawn, in ascending order.

    Of each stretch of a long curve, these are its smallest and its largest value, and of the whole
    curve also the first and the last one."""
    count = len(values)
    if count <= MAX_POINTS:
        return [*range(count)]
    numbers = with_nan(values)
    num_stretches = MAX_POINTS // 2 - 1
    chosen = {0, count - 1}
    for stretch in np.array_split(np.arange(count), num_stretches):
        missing = np.isnan(numbers[stretch])
        finite = stretch[~missing]
        if not len(finite):
            continue
        smallest = numbers[finite].argmin()
        largest = numbers[finite].argmax()
        chosen.add(int(finite[smallest]))
        chosen.add(int(finite[largest]))
    return sorted(chosen)


def with_nan(values: Sequence[float | None]) -> np.ndarray:
    """Return values with NaN for those that are missing."""
    return np.array(values, float)


def pick(values: Sequence[Any], indices: Iterable[int]) -> list[Any]:
    """Return the values at some indices."""
    return [values[index] for index in indices]
