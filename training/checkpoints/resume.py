"""A run written into a checkpoint, and brought back from the newest valid one, on however many processes."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from common.atomic import write_file
from common.errors import ConfigError
from data.store.hashing import files_identity
from models.base import ModelFamily
from training.checkpoints import storage
from training.checkpoints.best import Best, best_step
from training.checkpoints.state import (
    ADAPTER,
    BEST,
    EMA,
    OPTIMIZER,
    TrainerState,
    state_of,
    to_files,
    weights_of,
)
from training.checkpoints.storage import CheckpointError
from training.config import TrainConfig, to_yaml
from training.distributed.accelerator import DistributedError
from training.reporting.history import History
from training.reporting.sample_log import cut_all
from training.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    clear,
    fingerprint,
    note_start,
    restarted,
)

if TYPE_CHECKING:
    from training.trainer import Run


SEEN_WITHIN = 30.0  # seconds in which all nodes must see the same files


def base_hash(family: ModelFamily, config: TrainConfig) -> Future[str]:
    """The hash of the base model's files, which takes its time where it is not known yet: made beside the rest, in a
    thread that nothing waits for when the process ends."""
    files, cache = family.component_files("denoiser"), Path(config.data.cache_dir)
    made = Future[str]()

    def make() -> None:
        try:
            made.set_result(files_identity(files, cache))
        except BaseException as error:  # raised where the hash is asked for
            made.set_exception(error)

    Thread(target=make, daemon=True).start()
    return made


def write(run: Run) -> None:
    """Writes a checkpoint of `run`. Collective; the main process writes, and no other waits for it."""
    optimizer = run.engine.optimizer_state()
    if not run.main:
        return
    state = TrainerState(
        step=run.step,
        steps=run.config.steps,
        samples=run.step * run.total_batch_size,
        micro_batches_per_step=run.micro_batches_per_step,
        grad_accumulation_steps=run.config.grad_accumulation_steps,
        identity=identity(run),
        started_at=run.started_at,
        tracker_id=run.reporter.tracker_id,
        history=asdict(run.history),
        row=run.reporter.row,
        best_step=run.best.step if run.best else None,
    )
    weights = {
        ADAPTER: run.parts.adapted.state_dict(),
        EMA: run.averages.state_dict(),
        BEST: run.best.weights if run.best else {},
    }
    files = to_files(state, weights, run.parts.adapted.alphas(), optimizer)
    storage.save(run.folder / CHECKPOINTS, run.step, files, run.config.checkpoint.keep)


def identity(run: Run) -> dict[str, object]:
    """Facts that must be the same for the next step to be the one that would have come."""
    assert run.base is not None, "asked for on the main process only"
    return {
        "config": fingerprint(run.config),
        "dataset": run.parts.datasets.train.fingerprint,
        "base model": run.base.result(),
        "steps of the existing LoRA": run.parts.previous_steps,
    }


def resume(run: Run) -> None:
    """Goes on from the newest valid checkpoint of output_dir, if there is one. Collective."""
    if run.main:
        if run.config.overwrite and not restarted(run.folder):
            clear(run.folder)
        note_start(run.folder)
    run.accelerator.wait_for_everyone()
    found = agreed_checkpoint(run)
    if found is None:
        run.reporter.resume(-1, {})
    else:
        state = state_of(found)
        restore(run, found, state)
        run.reporter.resume(run.total_steps, state.row)
        run.reporter.say(f"resumed at step {run.step} of {run.config.steps}")
    if run.main:
        cut_all(run.folder, run.step)
        write_file(run.folder / CONFIG_FILE, to_yaml(run.config))
    run.accelerator.wait_for_everyone()


def agreed_checkpoint(run: Run) -> storage.Checkpoint | None:
    """The newest valid checkpoint that the main process sees; the others read that one, or the run ends. Collective."""
    folder = run.folder / CHECKPOINTS
    found, chosen = None, [None]
    if run.main:
        found, damaged = storage.newest(folder)
        for fault in damaged:
            run.reporter.say(f"passed over: {fault}")
        chosen = [None if found is None else (found.step, found.digest)]  # type: ignore[list-item]
    if run.accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    if run.main or chosen[0] is None:
        return found
    step, digest = chosen[0]
    last = time.monotonic() + SEEN_WITHIN
    while True:
        try:
            found = storage.read(storage.folder_of(folder, step))
            if found.digest == digest:
                return found
        except (OSError, storage.DamagedError):
            pass
        if time.monotonic() > last:
            raise DistributedError(
                f"{folder} is not the same folder on all nodes: rank {run.accelerator.process_index} does not see the "
                f"checkpoint of step {step} as the main process does. Name an --output_dir on a shared disk"
            )
        time.sleep(0.5)


def restore(run: Run, found: storage.Checkpoint, state: TrainerState) -> None:
    """Puts what a checkpoint holds into `run`; raises CheckpointError if it is another run's."""
    per_step, processes = state.micro_batches_per_step, run.accelerator.num_processes
    same_command = state.grad_accumulation_steps == run.config.grad_accumulation_steps
    if per_step != run.micro_batches_per_step and same_command and per_step % processes == 0:
        run.accumulation = per_step // processes
        run.reporter.say(
            f"as in the steps before, {per_step} micro-batches per step: grad_accumulation_steps is {per_step} / "
            f"{processes} processes = {run.accumulation}"
        )
    if found.step > run.config.steps:
        raise ConfigError(f"--steps {run.config.steps}: {run.folder} is at step {found.step} already")
    steps, course = run.config.steps, run.config.optim.lr_schedule
    if state.steps != steps and course != "constant":
        run.reporter.say(
            f"note: --steps was {state.steps} and is {steps}: from here on the {course} learning rate is that of "
            f"{steps} steps"
        )
    here = identity(run) if run.main else {}
    differing = [f"{k}: {state.identity.get(k)} there, {v} here" for k, v in here.items() if state.identity.get(k) != v]
    if per_step != run.micro_batches_per_step:
        differing.append(
            "micro-batches per step (processes x grad_accumulation_steps): "
            f"{per_step} there, {run.micro_batches_per_step} here"
        )
    if differing:
        raise CheckpointError(
            "\n  ".join([f"the checkpoint of step {found.step} in {run.folder} is of a different run", *differing])
            + "\nChoose another --output_dir, or give --overwrite to start again there"
        )
    run.engine.load(weights_of(found, ADAPTER), storage.from_bytes(found.files[OPTIMIZER]))
    run.averages.load_state_dict(weights_of(found, EMA))
    kind, run.history = run.history.validation_kind, History(**state.history)
    run.step = run.saved_step = found.step
    if kind and run.history.validate_by(kind):
        run.reporter.say("the held-out images, or what is measured on them, are not those of the steps before: "
                         "validation losses begin anew")  # fmt: skip
    restore_best(run, found, state.best_step)
    run.started_at, run.reporter.tracker_id = state.started_at, state.tracker_id


def restore_best(run: Run, found: storage.Checkpoint, kept: int | None) -> None:
    """Brings back the weights of the best step of the history; raises ConfigError if they are wanted and were not
    kept."""
    if not run.config.keeps_best:
        return
    if kept is not None and run.history.validation:
        run.best = Best(kept, weights_of(found, BEST))
    run.keep_if_best()
    step = best_step(run.history.validation)
    if step != (run.best.step if run.best else None):
        raise ConfigError(
            f"--checkpoint.best, --export.which best: the weights of step {step}, whose validation loss is the lowest "
            f"so far, were not kept in {run.folder}. Leave both off, or give --overwrite to start again there"
        )
