"""After the last step: previews, drawn by all ranks, and the files of a finished run, written by the main process."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from common.atomic import write_file
from data.dataset import LatentDataset
from models.base import ModelFamily
from objectives.processes import sample_as_trained
from training import build, export, preview
from training.config import TrainConfig
from training.distributed.engine import is_sharded
from training.metadata import Provenance
from training.reporting import trackers
from training.reporting.loss_files import loss_json, loss_png
from training.trainer import Run

Images = dict[str, np.ndarray]
Drawn = tuple[list[str], Images] | None


def captions(family: ModelFamily, shown: LatentDataset) -> list[str]:
    """What previews are drawn of, if nothing else was asked for: of clips, whose first frames are given, the first."""
    return list(islice(shown.first_captions(), 4)) if family.takes_image else shown.captions(4)


def draw(
    config: TrainConfig, family: ModelFamily, shown: LatentDataset, pipeline: Any, prompt: str, number: int
) -> np.ndarray:
    """One preview, as preview.draw has it."""
    step = family.pixel_step()
    side = max(step, config.data.resolution // step * step)  # as buckets have it
    options = {"height": side, "width": side, **family.preview_options(config.preview.guidance_scale)}
    if family.takes_image:
        latents = shown.latents(number % len(shown))
        options |= {"image": preview.first_frame(family, latents, pipeline, side), "num_frames": config.data.frames}
    return preview.draw(pipeline, prompt, number, config.preview, options)


def draw_previews(run: Run, trained: dict[str, Tensor]) -> Drawn:
    """Prompts, and images (N, H, W, 3) before and after training, on the main process; None if they could not be drawn,
    which is said. `trained`: the weights after it. Collective; each rank draws its share. Leaves if asked to: the
    checkpoint of the last step is there.
    """
    config, parts, ranks = run.config, run.parts, run.accelerator.num_processes
    shown = parts.datasets.validation or parts.datasets.train
    prompts = list(config.preview.prompts) or captions(parts.family, shown)
    rounds, first = -(-len(prompts) // ranks), run.accelerator.process_index
    numbers = [first + i * ranks for i in range(rounds)]
    if is_sharded(run.accelerator):  # takes all ranks for each pass
        numbers = [min(number, len(prompts) - 1) for number in numbers]
    mine = {number: prompts[number] for number in numbers if number < len(prompts)}

    def load() -> Any:
        pipeline = parts.family.pipeline(parts.adapted.model).to(run.accelerator.device)
        return sample_as_trained(pipeline, config.objective)

    attempt = preview.Attempt(load, partial(draw, config, parts.family, shown))
    drawn = preview.images_of(parts.adapted, [run.initial, trained], mine, rounds, attempt, run.requests.leaving)
    if drawn is None:
        run.leave(run.requests.agreed)
    everyone: list[Any] = [(drawn, attempt.error)] * ranks
    if ranks > 1:
        dist.gather_object(everyone[0], everyone if run.main else None, group=run.agreement.group)
    if not run.main:
        return None
    if error := next((error for _, error in everyone if error), None):
        run.reporter.say(f"no previews, which could not be drawn:\n{error}\nThe adapter is written all the same")
        return None
    labelled = {}
    for which, label in enumerate(("before", "after")):
        by_number = {n: image for images, _ in everyone for n, image in images[which].items()}
        labelled[label] = np.stack([by_number[n] for n in range(len(prompts))])
    return prompts, labelled


@dataclass(frozen=True)
class Result:
    """Weights to export."""

    suffix: str
    """Of the name of their files."""
    step: int
    about: str
    weights: dict[str, Tensor]


def results(run: Run) -> list[Result]:
    """The adapter, and after it what is exported beside it: of an EMA and the weights that it is of, the other ones."""
    config, best = run.config, run.best
    average, last = f"EMA of decay {config.ema.decay:g}, ", f"after step {run.step}"
    kinds = {"ema": average + last, "raw": last} if config.ema.decay else {"raw": last}
    use = config.ema.use if config.ema.decay else "raw"
    if config.export.which == "best" and best is not None:
        loss = next(entry["loss"] for entry in run.history.validation if entry["step"] == best.step)
        about = f"after step {best.step} of {run.step}, whose validation loss {loss:.5f} is the lowest"
        return [Result("", best.step, (average if use == "ema" else "") + about, best.weights)]
    if config.export.which == "best":
        run.reporter.say(f"no validation loss was finite: the adapter is that after step {run.step}")
    found = []
    for kind in sorted(kinds, key=lambda kind: kind != use):
        with run.averages.shown(kind):
            weights = run.parts.adapted.state_dict()
        found.append(Result("" if kind == use else f".{kind}", run.step, kinds[kind], weights))
    return found


def finish(run: Run) -> tuple[list[Result], Drawn]:
    """All that needs every rank. Afterwards the main process is on its own, and the others may leave. Collective."""
    exported = results(run)
    drawn = draw_previews(run, exported[0].weights) if run.config.preview.enabled else None
    if run.requests.leaving():
        run.leave(run.requests.agreed)
    return exported, drawn


def write(run: Run, finished: tuple[list[Result], Drawn]) -> None:
    """Writes the adapter, the loss files, the previews and, if asked for, the merged model. Main process only."""
    config, parts = run.config, run.parts
    exported, drawn = finished
    if is_sharded(run.accelerator):
        parts = build.on_one_process(config, parts)
    written: list[Path] = []
    for result in reversed(exported):  # the adapter itself last: it stays in the model
        parts.adapted.load_state_dict(result.weights)
        steps = parts.previous_steps + result.step
        provenance = Provenance(steps, run.total_batch_size, run.started_at, result.about)
        files = replace(config.export, name=config.export.name + result.suffix)
        written += export.write_adapter(replace(config, export=files), parts, provenance)
    for name, content in (("loss.json", loss_json(run.history, run.total_steps)), ("loss.png", loss_png(run.history))):
        write_file(run.folder / name, content)
        written.append(run.folder / name)
    if config.export.merged:
        written.append(export.write_merged(config, parts.family, parts.adapted))
    if drawn is not None:
        prompts, images = drawn
        path = run.folder / "preview.png"
        write_file(path, preview.grid_png(images, prompts))
        named = {f"preview/{label}": array for label, array in images.items()}
        trackers.log_images(run.accelerator, named, run.total_steps)
        written.append(path)
    report(run, exported[0], written)
    for path in sorted(path for kind in ("ema", "raw") for path in run.folder.glob(f"{config.export.name}.{kind}.*")):
        if path not in written:
            print(f"note: {path} is of an earlier run, which had other weights beside its adapter")


def report(run: Run, adapter: Result, written: list[Path]) -> None:
    """Says what came out."""
    validation = run.history.validation
    if len(validation) > 1:
        first, last = validation[0]["loss"], validation[-1]["loss"]
        print(f"validation loss: {first:.5f} -> {last:.5f} ({100 * (last / first - 1):+.1f} %)")
    if run.history.skipped:
        print(f"skipped, because they were not finite: steps {', '.join(map(str, run.history.skipped))}")
    print(f"waited for data: {100 * run.waiting.share:.1f} % of the training time")
    print(f"total steps: {run.parts.previous_steps} + {run.step} = {run.total_steps}")
    print(f"the adapter: {adapter.about}")
    for path in written:
        print(f"wrote {path}")
