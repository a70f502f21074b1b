"""Trains an adapter on a frozen diffusion model: `accelerate launch train_lora.py [recipe.yaml] [--option value]`.

`python train_lora.py data|export-dataset [recipe.yaml] [--option value]` shows what a run would be trained on, or
writes it into a folder for other machines (docs/data.md); `inspect|convert|merge|resize|extract` work on finished files
(docs/tools.md).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING

import tools
from common.errors import AdapterError, ConfigError, DataError, ModelError
from tools.data import options
from training.cli import load_config
from training.config import TrainConfig
from training.run_folder import check_output_dir, held
from training.stopping.signals import Asked, Interruptions, Stopped, end_with_launcher, requeue

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.distributed.failures import Failures

LOCK_WAIT = 120.0  # seconds; a launcher's ranks may outlive it a little, and NFS keeps a dead client's locks for 90
USER_ERRORS = (ConfigError, DataError, ModelError, AdapterError)


def main(argv: list[str] | None = None) -> int:
    """Runs one training, or one tool. Returns the exit code: 2 for a user's mistake, 1 for what could not be done."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in tools.COMMANDS:
            return run_tool(tools.read_options(argv))
        if argv and argv[0] in options.COMMANDS:
            return run_tool(options.read_options(argv))
        config = load_config(argv)
        if rank() == 0:
            check_output_dir(config)
    except USER_ERRORS as error:
        return fail(error, 2)
    interruptions = Interruptions()
    with interruptions.handled():
        end_with_launcher()
        try:
            return run_training(config, interruptions)
        except Stopped as stopped:
            first = rank() == 0 if stopped.is_first is None else stopped.is_first
            if first and not stopped.agreed and stopped.asked is Asked.REQUEUE:
                stopped.done += f"; {requeue()}"
            if first:
                print(f"stopped by {stopped}", flush=True)
            return stopped.code


def run_training(config: TrainConfig, interruptions: Interruptions) -> int:
    """One training, whose failure all ranks get to know; returns the exit code."""
    from common.atomic import WriteError
    from training.checkpoints.storage import (
        CheckpointError,  # torch loads here: what is wrong above is said within a second
    )
    from training.distributed.accelerator import DistributedError, build_accelerator
    from training.distributed.failures import Failures, explained
    from training.reporting.history import TrainingDiverged

    failures = None
    try:
        quieten_libraries()
        accelerator = build_accelerator(config)
        failures = Failures(accelerator)
        with held(config, LOCK_WAIT, say) if accelerator.is_main_process else nullcontext():
            train(config, accelerator, failures, interruptions)
    except Stopped as stopped:
        if failures is not None and not stopped.agreed:  # asked for while every rank was on its own
            stopped.is_first = failures.is_first(stopped)
        raise
    except Exception as error:
        if failures is not None:
            interruptions.ignored()
        if failures is not None and not failures.is_first(error):
            return 1  # another rank failed first, and says so
        known = isinstance(error, (CheckpointError, TrainingDiverged, WriteError, DistributedError, *USER_ERRORS))
        fail(str(error) if known else explained(error, config), 1, failures is not None)
        if failures is not None:
            failures.wait_for_others()
        return 2 if isinstance(error, USER_ERRORS) else 1
    finally:
        if failures is not None:
            failures.close()
        leave()
    return 0


def train(config: TrainConfig, accelerator: Accelerator, failures: Failures, interruptions: Interruptions) -> None:
    """The whole run, in the order in which its parts need each other."""
    from adapter_files.keys import file_names
    from data.precompute.build import build_datasets
    from training import build, finish
    from training.checkpoints.resume import resume
    from training.distributed.engine import wants_contiguous
    from training.export import check as check_export
    from training.loss import build_loss
    from training.metadata import Parts
    from training.reporting import trackers
    from training.trainer import Run

    family = build.family_of(config)
    # the encoders live and die in here
    datasets = build_datasets(config.data, family, accelerator, not config.bucket_mode)
    denoiser, dtype = build.load_denoiser(config, family, wants_contiguous(accelerator))
    names = file_names(family, denoiser)
    adapted, previous_steps = build.attach_adapters(config, family, denoiser, names)
    loss_function = build_loss(family, config.objective, config.loss_function, dtype)

    parts = Parts(family, datasets, adapted, names, previous_steps)
    check_export(config, parts)
    engine = build.build_engine(config, accelerator, denoiser, adapted)
    with interruptions.deferred():  # from here on a signal is answered between two steps, by all ranks together
        run = Run(config, accelerator, parts, engine, loss_function, interruptions)
        resume(run)  # nothing to do in a fresh output_dir
        trackers.start(accelerator, config, run.reporter.tracker_id)  # a run that goes on is one run there too
        say(build.summary(run))
        for batch in run.batches():
            run.train_on(batch)
        finished = finish.finish(run)
    failures.close()
    if run.main:  # the others have no part in this, and need not wait for it
        finish.write(run, finished)
    trackers.finish(accelerator)


def run_tool(options: tools.Options | options.RunOptions) -> int:
    """A sub-command; raises what is a user's mistake."""
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        quieten_libraries()
        from common.atomic import WriteError  # torch loads here, which takes long enough to be interrupted
        from tools.rewrite import ToolError

        try:
            if not isinstance(options, options.RunOptions):
                return tools.run(options)
            try:
                return import_module(f"tools.data.{options.module}").run(options)
            finally:
                leave()
        except (ToolError, WriteError) as error:
            return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", 130)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def terminated(*_: object) -> None:
    """Ends the process as SIGTERM does, but not before what it had begun to write is removed."""
    sys.exit(128 + signal.SIGTERM)


def quieten_libraries() -> None:
    for library in ("TRANSFORMERS", "DIFFUSERS", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def leave() -> None:
    """Leaves the process group: gloo aborts a process that ends without this."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def fail(error: Exception | str, code: int, first: bool = False) -> int:
    """Says what is wrong, and passes the exit code on. Most is wrong on all ranks alike, and then said by one: another
    than rank 0 waits, so that the launcher ends it before it says the same; `first` is known to be the only one."""
    if rank() and not first:
        time.sleep(1)
    print(f"error: {f'rank {rank()}: ' if rank() else ''}{error}", file=sys.stderr, flush=True)
    return code


def say(message: str) -> None:
    """Prints on one rank."""
    if rank() == 0:
        print(message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
