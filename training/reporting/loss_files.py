"""loss.json and loss.png: the losses of a run as a file and as a chart."""

import io
import json
from typing import Any

from training.reporting.history import History, Validation, is_finite


def loss_json(history: History, total_steps: int) -> str:
    """Return the content of loss.json."""
    content: dict[str, Any] = {
        "total_steps": total_steps,
        "loss_per_step": json_numbers(history.step_losses),
        "loss_per_micro_step": json_numbers(history.micro_losses),
        "gradient_norm_per_step": json_numbers(history.grad_norms),
        "validation": [json_entry(entry) for entry in history.validation],
        "earlier_validation": [json_entry(entry) for entry in history.earlier_validation],
        "skipped_steps": history.skipped_steps,
    }
    return json.dumps(content, indent=1)


def json_entry(entry: Validation) -> dict[str, float | None]:
    return dict(zip(entry, json_numbers(list(entry.values())), strict=True))


def json_numbers(values: list[float]) -> list[float | None]:
    """Replace NaN and infinity, which JSON does not have, by null."""
    numbers: list[float | None] = []
    for value in values:
        numbers.append(value if is_finite([value]) else None)
    return numbers


def smoothed(values: list[float], span: int) -> list[float]:
    """Return the exponential moving average with bias correction; NaN and infinity are left out."""
    decay = 1 - 2 / (span + 1)
    total, weight = 0.0, 0.0
    result = []
    for value in values:
        if is_finite([value]):
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        result.append(total / weight if weight else float("nan"))
    return result


def loss_png(history: History) -> bytes:
    """Return a chart of the losses as a PNG."""
    # a slow import that only the end of a run needs
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = history.step_losses
    steps = range(1, len(losses) + 1)
    span = max(1, len(losses) // 20)
    figure = Figure(figsize=(9, 5), dpi=110)  # no layout engine: it would draw the figure twice
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.095, 0.1, 0.885, 0.83))
    axes.plot(
        steps,
        losses,
        color="tab:blue",
        alpha=0.3,
        linewidth=1,
        marker="." if len(losses) < 3 else None,
        label="training, raw",
    )
    if span > 1:
        axes.plot(
            steps,
            smoothed(losses, span),
            color="tab:blue",
            label=f"training, smoothed over {span} steps",
        )
    if history.validation:
        points = [(entry["step"], entry["loss"]) for entry in history.validation]
        axes.plot(*zip(*points, strict=True), color="tab:orange", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss", title="Loss per optimizer step")
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
