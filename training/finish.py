"""After the last step: previews, drawn by all ranks, and the files of a finished run, written by the main process."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from training import export, preview, setup, tracking
from training.engine import is_sharded
from training.files import write_file
from training.metadata import Provenance
from training.metrics import loss_json, loss_png
from training.run import Run

Images = dict[str, np.ndarray]


def draw_previews(run: Run) -> tuple[list[str], Images]:
    """Prompts, and images (N, H, W, 3) before and after training, on the main process. Collective; each rank draws its
    share. Leaves if asked to: the checkpoint of the last step is there."""
    config, parts, ranks = run.config, run.parts, run.accelerator.num_processes
    shown = parts.datasets.validation or parts.datasets.train
    prompts = list(config.preview.prompts) or shown.captions(4)
    rounds, first = -(-len(prompts) // ranks), run.accelerator.process_index
    numbers = [first + i * ranks for i in range(rounds)]
    if is_sharded(run.accelerator):  # takes all ranks for each pass
        numbers = [min(number, len(prompts) - 1) for number in numbers]
    mine = {number: prompts[number] for number in numbers if number < len(prompts)}
    pipeline = parts.family.pipeline(parts.adapted.model).to(run.accelerator.device)
    side = config.data.resolution
    options = {"height": side, "width": side, **parts.family.preview_options(config.preview.guidance_scale)}
    drawn = preview.images_of(
        parts.adapted, [run.initial, parts.adapted.state_dict()], mine, rounds,
        partial(preview.draw, pipeline, config=config.preview, options=options), run.requests.leaving,
    )  # fmt: skip
    if drawn is None:
        run.leave(run.requests.agreed)
    everyone: list[Any] = [drawn] * ranks
    if ranks > 1:
        dist.gather_object(drawn, everyone if run.main else None, group=run.agreement.group)
    if not run.main:
        return prompts, {}
    labelled = {}
    for which, label in enumerate(("before", "after")):
        by_number = {n: image for images in everyone for n, image in images[which].items()}
        labelled[label] = np.stack([by_number[n] for n in range(len(prompts))])
    return prompts, labelled


def finish(run: Run) -> tuple[list[str], Images] | None:
    """All that needs every rank. Afterwards the main process is on its own, and the others may leave. Collective."""
    drawn = None
    if run.config.preview.enabled and run.parts.family.draws:
        drawn = draw_previews(run)
    elif run.config.preview.enabled:
        run.reporter.say(f"no previews: {run.parts.family.name} draws of prompts and images, not of prompts alone")
    if run.requests.leaving():
        run.leave(run.requests.agreed)
    return drawn


def write(run: Run, drawn: tuple[list[str], Images] | None) -> None:
    """Writes the adapter, the loss files, the previews and, if asked for, the merged model. Main process only."""
    config, parts = run.config, run.parts
    if is_sharded(run.accelerator):
        parts = setup.on_one_process(config, parts)
    provenance = Provenance(run.total_steps, run.total_batch_size, run.started_at)
    written = export.write_adapter(config, parts, provenance)
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
        tracking.log_images(run.accelerator, named, run.total_steps)
        written.append(path)
    report(run, written)


def report(run: Run, written: list[Path]) -> None:
    """Says what came out."""
    validation = run.history.validation
    if len(validation) > 1:
        first, last = validation[0]["loss"], validation[-1]["loss"]
        print(f"validation loss: {first:.5f} -> {last:.5f} ({100 * (last / first - 1):+.1f} %)")
    if run.history.skipped:
        print(f"skipped, because they were not finite: steps {', '.join(map(str, run.history.skipped))}")
    print(f"waited for data: {100 * run.waiting.share:.1f} % of the training time")
    print(f"total steps: {run.parts.previous_steps} + {run.step} = {run.total_steps}")
    for path in written:
        print(f"wrote {path}")
