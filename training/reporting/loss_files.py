"""loss.json and loss.png."""

import io
import json

from training.reporting.history import History, is_finite


def loss_json(history: History, total_steps: int) -> str:
    """The content of loss.json."""
    content = {
        "total_steps": total_steps,
        "loss_per_step": numbers(history.step_losses),
        "loss_per_micro_step": numbers(history.micro_losses),
        "gradient_norm_per_step": numbers(history.grad_norms),
        "validation": [finite(entry) for entry in history.validation],
        "other_validation": [finite(entry) for entry in history.other_validation],
        "skipped_steps": history.skipped,
    }
    return json.dumps(content, indent=1)


def finite(entry: dict[str, float]) -> dict[str, float | None]:
    return dict(zip(entry, numbers(list(entry.values())), strict=True))


def numbers(values: list[float]) -> list[float | None]:
    """JSON has no NaN and no infinity."""
    return [value if is_finite([value]) else None for value in values]


def smoothed(values: list[float], span: int) -> list[float]:
    """Exponential moving average with bias correction."""
    decay, mean, weight, result = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        if is_finite([value]):
            mean = decay * mean + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        result.append(mean / weight if weight else float("nan"))
    return result


def loss_png(history: History) -> bytes:
    """The loss curves as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow import, needed once
    from matplotlib.figure import Figure

    losses = history.step_losses
    steps = range(1, len(losses) + 1)
    span = max(1, len(losses) // 20)
    figure = Figure(figsize=(9, 5), dpi=110)  # a layout engine would draw it twice
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.095, 0.1, 0.885, 0.83))
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, marker="." if len(losses) < 3 else None,
              label="training, raw")  # fmt: skip
    axes.plot(steps, smoothed(losses, span), color="tab:blue", label=f"training, smoothed over {span} steps")
    if history.validation:
        points = [(entry["step"], entry["loss"]) for entry in history.validation]
        axes.plot(*zip(*points, strict=True), color="tab:orange", marker="o", label="validation")
    axes.set(xlabel="step", title="Loss per optimizer step")
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
