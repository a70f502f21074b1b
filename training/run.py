"""One run from start to end. torch is imported inside the functions, after the options were
checked."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.announce import announced
from common.errors import UserError, counted
from training.config import TrainConfig
from training.memory.kept_changes import with_kept_changes
from training.run_folder import locked_folder
from training.stopping.signals import RunStopped, SignalHandler, report_stop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from training.components import RunComponents
    from training.distributed.failures import FailureWatch
    from training.export import RunExport
    from training.loss import LossFunction
    from training.run_record import RunRecord
    from training.services import RunServices
    from training.train_state import TrainState
    from training.trainer import Trainer

LOCK_TIMEOUT = 120.0
"""Seconds. Processes may outlive their launcher a little, and NFS keeps the locks of a dead client
for 90 seconds."""
LEAVE_TIMEOUT = 10.0
"""Seconds in which a failed process may leave the process group."""


class RunFailed(Exception):
    """A run that ended with an error, which has been printed."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


def run_training(config: TrainConfig, signals: SignalHandler) -> int:
    """Run one training; return the exit code. If one process fails, all end."""
    quiet_libraries()
    say(heading(config))
    try:
        with run_guard(config, signals) as (accelerator, failures):
            lock = nullcontext()
            if accelerator.is_main_process:
                run_config = with_kept_changes(config)
                lock = locked_folder(run_config, LOCK_TIMEOUT, say)  # type: ignore[assignment]
            with lock:
                record = build_record(config, accelerator, failures)
                with record.kept():
                    train(config, accelerator, failures, signals, record)
    except RunFailed as failure:
        return failure.exit_code
    return 0


def heading(config: TrainConfig) -> str:
    """Return the first line of a run, which needs nothing but the options."""
    model = Path(config.model.path or "").name
    return (
        f"training    {config.algorithm} of rank {config.rank} for {model}, "
        f"{counted(config.steps, 'step')}, into {config.output_dir}"
    )


@contextmanager
def run_guard(
    config: TrainConfig, signals: SignalHandler
) -> Iterator[tuple[Accelerator, FailureWatch]]:
    """Connect the processes for a block; report an error in it to all processes, and print the
    first one.

    Raises RunFailed after an error was printed, and RunStopped if a signal stopped the run."""
    with signals.held(), announced("importing the libraries"):
        # imports torch: earlier errors are faster
        from training.distributed.accelerator import build_accelerator
        from training.distributed.failures import FailureWatch

    failures: FailureWatch | None = None
    try:
        with announced("connecting the processes"):
            accelerator = build_accelerator(config)
        failures = FailureWatch(accelerator)
        yield accelerator, failures
    except RunStopped as stopped:
        if failures is not None and not stopped.is_agreed:  # the processes stop independently
            stopped.is_first = failures.report(stopped)
            report_stop(stopped, launched_rank())
            leave_process_group(stopped.code)
        raise
    except Exception as error:
        exit_code = handle_error(error, config, failures, signals)
        leave_process_group(exit_code)
        raise RunFailed(exit_code) from error
    finally:
        if failures is not None:
            failures.close()
        leave_process_group()


def handle_error(
    error: Exception, config: TrainConfig, failures: FailureWatch | None, signals: SignalHandler
) -> int:
    """Report an error to all processes and print it if it is the first one; return the exit code."""
    from common.atomic import WriteError
    from training.checkpoints.storage import CheckpointError
    from training.distributed.accelerator import DistributedError
    from training.distributed.failures import describe_error
    from training.reporting.history import TrainingDiverged
    from training.sampling.renderer import SamplingError

    exit_code = 1
    if isinstance(error, UserError):
        exit_code = 2
    if isinstance(error, SamplingError):
        exit_code = 0
    if failures is not None:
        signals.ignore_signals()
        if not failures.report(error, exit_code):
            return exit_code  # another process failed first, and prints its error
    expected_errors = (
        UserError,
        CheckpointError,
        TrainingDiverged,
        WriteError,
        DistributedError,
        SamplingError,
    )
    message = str(error) if isinstance(error, expected_errors) else describe_error(error, config)
    print_error(message, is_first=failures is not None)
    if failures is not None:
        failures.wait_for_others()
    return exit_code


def build_record(
    config: TrainConfig, accelerator: Accelerator, failures: FailureWatch
) -> RunRecord:
    """Return what keeps the files about the run up to date. It also hears of the failure of another
    process."""
    from training.run_record import RunRecord

    num_processes, is_main = accelerator.num_processes, accelerator.is_main_process
    record = RunRecord(Path(config.output_dir), config.steps, num_processes, is_main)
    failures.on_failure = record.status.end_by_other
    return record


def train(
    config: TrainConfig,
    accelerator: Accelerator,
    failures: FailureWatch,
    signals: SignalHandler,
    record: RunRecord,
) -> None:
    """Build the run, train, and export the result."""
    from training import build
    from training.batch_stream import BatchStream
    from training.callbacks import step_callbacks, stop_run
    from training.checkpoints.resume import RunCheckpoints
    from training.distributed.device import device_notes
    from training.export import RunExport, check_export
    from training.memory.run_plan import fit_run
    from training.publishing import publication_notes
    from training.reporting.status import EXPORTING
    from training.reporting.trackers import start_tracker
    from training.sampling.renderer import build_renderer
    from training.services import RunServices
    from training.trainer import Trainer

    notes = [f"note: {note}" for note in device_notes(accelerator.device, config.training_dtype)]
    if accelerator.is_main_process:
        notes += publication_notes(config.hub)
    for note in notes:
        record.say(note)
    config, planned_bytes = fit_run(config, accelerator, record.say)
    components, loss_function = build_components(config, accelerator, record)
    check_export(components)
    initial_weights = components.adapted.state_dict() if config.preview else None
    with announced("moving the model to the device"):
        engine = build.build_engine(accelerator, components)

    # from here on, all processes answer signals together, between two steps
    with signals.deferred():
        services = RunServices.build(config, accelerator, engine, signals, failures, record)
        services.memory.planned.update(planned_bytes)
        checkpoints = RunCheckpoints(components, engine, services)
        with announced("looking for a checkpoint"):
            state = checkpoints.resume()
        start_tracker(accelerator, config, services.reporter.tracker_id)
        batches = BatchStream(config, components.datasets.train, services.process)
        trainer = Trainer(config, engine, loss_function, batches, state, services)
        renderer = build_renderer(components, services)
        trainer.callbacks = step_callbacks(trainer, components, checkpoints, renderer)
        describe_run(components, loss_function, services, state)
        try:
            trainer.train()
        except BaseException:
            checkpoints.writer.finish(record.say)
            raise
        record.status.set_phase(EXPORTING)
        with announced("writing the checkpoint"):
            checkpoints.writer.wait()
        export = RunExport(components, services, state, renderer)
        export.collect_weights()
        if services.requests.must_stop():
            stop_run(services.requests.agreed, trainer)
    write_results(export, trainer, signals, initial_weights)


def describe_run(
    components: RunComponents,
    loss_function: LossFunction,
    services: RunServices,
    state: TrainState,
) -> None:
    """Print the summary of a run, and write the facts that its report shows."""
    from training.report.facts import run_facts
    from training.summary import data_lines, summary

    if not services.process.is_main:
        return
    per_step = state.micro_batches_per_step
    text = summary(components, loss_function, services.process, per_step, state.step)
    say(text)
    record = services.record
    samples = data_lines(components.config, components.datasets)
    full_text = "\n".join([*samples, text])
    facts = run_facts(components, loss_function, services, full_text, record.data)
    record.write_facts(facts)


def write_results(
    export: RunExport,
    trainer: Trainer,
    signals: SignalHandler,
    initial_weights: dict[str, Tensor] | None,
) -> None:
    """Write the files of a finished run, and draw the preview and the grids. Collective.

    `initial_weights`: the weights before training, for the preview. None: no preview is drawn."""
    from training.callbacks import stop_run
    from training.distributed.device import host_threads
    from training.publishing import publish_run
    from training.reporting.status import EXPORTING
    from training.reporting.trackers import finish_trackers

    services = trainer.services
    services.record.status.set_phase(EXPORTING)
    with host_threads(services.accelerator), announced("writing the adapter"):
        if services.process.is_main:
            export.write(trainer.batches.timer.share)
    services.barrier.wait()
    draw_functions: list[Callable[[], bool]] = []
    if initial_weights is not None:
        draw_functions.append(partial(export.draw_preview, initial_weights))
    if trainer.config.sample.grid:
        draw_functions.append(export.draw_grids)
    for draw in draw_functions:
        with signals.deferred():
            was_stopped = draw()
            services.barrier.wait()
            if was_stopped and services.requests.must_stop():
                stop_run(services.requests.agreed, trainer)
    if services.process.is_main:
        publish_run(trainer.config, services.accelerator)
    services.barrier.wait()
    finish_trackers(services.accelerator)
    services.barrier.wait()  # the processes leave the group together


def build_components(
    config: TrainConfig, accelerator: Accelerator, record: RunRecord
) -> tuple[RunComponents, LossFunction]:
    """Encode the data, load the base model and attach adapters. Collective."""
    from adapter_files.spellings import layer_spellings
    from common.process import ProcessInfo
    from data.precompute.build import DatasetBuilder
    from training import build
    from training.assistant import distillation_notes
    from training.components import RunComponents
    from training.distributed.device import host_threads
    from training.distributed.sharding import needs_contiguous_weights
    from training.loss import build_loss
    from training.memory.phase_memory import IMAGES
    from training.report.data_pictures import MAX_COMPARED
    from training.reporting.status import LOADING
    from training.sampling.control_images import first_controls
    from training.sampling.prepare import check_prompts, prepare_samples
    from training.summary import data_lines

    family = build.load_family(config)
    notes = build.format_notes(config, family) + build.slider_notes(config, family)
    for note in [*notes, *distillation_notes(config, family)]:
        record.say(note)
    # text encoders and VAE are loaded and freed in here, so they come before the denoiser
    process, only_square = ProcessInfo.of(accelerator), not config.bucket_mode
    check_prompts(config, family)
    check = partial(build.check_adapters, config, family)
    record.status.set_phase(IMAGES)
    extra_prompts = build.extra_prompts(config, family)
    with DatasetBuilder.opened(config.training_data, family, process) as builder:
        builder.extra_prompts = extra_prompts
        builder.on_progress = record.status.set_encoded
        plan = builder.plan(only_square)
        datasets = builder.encode(plan, check)
        max_compared = MAX_COMPARED if config.sample.every else 0
        record.add_pictures(builder, plan, datasets, max_compared)
        sample_controls = first_controls(config, builder, datasets)
    takes_controls = family.controls.max_count > 0
    for line in data_lines(config, datasets, takes_controls):
        say(line)
    samples = None
    if config.draws_samples:
        device = accelerator.device
        samples = prepare_samples(config, family, datasets, device, sample_controls)
        for note in samples.notes:
            record.say(note)
    record.status.set_phase(LOADING)
    contiguous = needs_contiguous_weights(accelerator)
    with announced("loading the base model"):
        denoiser, dtype = build.load_denoiser(config, family, accelerator.device, contiguous)
    names = layer_spellings(family, denoiser)
    with host_threads(accelerator), announced("attaching the adapter"):
        adapted, previous_steps = build.attach_adapters(config, family, denoiser, names)
    loss_function = build_loss(family, config.objective, config.loss_function, dtype)
    components = RunComponents(config, family, datasets, adapted, names, previous_steps, samples)
    return components, loss_function


def quiet_libraries() -> None:
    """Let the libraries print errors only."""
    for library in ("TRANSFORMERS", "DIFFUSERS", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def leave_process_group(exit_code: int | None = None) -> None:
    """Leave the process group: gloo aborts a process that ends without this.

    `exit_code`: of a run that failed. NCCL may then wait forever for another process, so this one
    ends after LEAVE_TIMEOUT."""
    import torch.distributed as dist

    from training.distributed.failures import end_process

    if not dist.is_available() or not dist.is_initialized():
        return
    if exit_code is None:
        dist.destroy_process_group()
        return
    thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
    thread.start()
    thread.join(LEAVE_TIMEOUT)
    if thread.is_alive():
        end_process(exit_code)


def launched_rank() -> int:
    """Return the index of this process that the launcher set."""
    return int(os.environ.get("RANK", "0"))


def print_error(message: str, is_first: bool = False) -> None:
    """Print an error.

    Most errors occur in all processes, and one of them should report: other processes than rank 0
    wait, so that the launcher ends them first. `is_first`: no other process reports."""
    rank = launched_rank()
    if rank and not is_first:
        time.sleep(1)
    prefix = f"rank {rank}: " if rank else ""
    print(f"error: {prefix}{message}", file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Print a message in one process."""
    if launched_rank() == 0:
        print(message, flush=True)
