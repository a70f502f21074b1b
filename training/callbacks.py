"""The callbacks of a training step; `step_callbacks` has their order."""

from pathlib import Path

from common.announce import announced
from training.checkpoints.best import BestWeights, best_step, stops_early
from training.checkpoints.resume import RunCheckpoints
from training.checkpoints.storage import checkpoint_paths
from training.compilation import ReportCompilation
from training.components import RunComponents
from training.memory.phase_memory import VALIDATION
from training.optim.schedule import scheduled_learning_rate
from training.record_callbacks import UpdateStatus, WriteReport
from training.reporting.history import TrainingDiverged, finite_mean, is_finite
from training.reporting.trackers import finish_trackers
from training.run_folder import CHECKPOINTS
from training.sampling.callback import DrawSamples
from training.sampling.renderer import SampleRenderer
from training.step_export import ExportSteps
from training.stopping.signals import RunStopped, StopRequest, requeue_job
from training.trainer import StepCallback, Trainer
from training.validation import validate

MAX_NAMED_IMAGES = 5


def step_callbacks(
    trainer: Trainer,
    components: RunComponents,
    checkpoints: RunCheckpoints,
    renderer: SampleRenderer | None,
) -> list[StepCallback]:
    """Return the callbacks of a run, in the order in which they are called after each step."""
    log_metrics = LogMetrics(trainer, checkpoints)
    save_checkpoint = SaveCheckpoint(trainer, checkpoints, log_metrics)
    return [
        *compilation_reports(trainer),
        CompareRanks(trainer),
        log_metrics,
        UpdateStatus(trainer.state, trainer.services, components.previous_steps),
        Validate(trainer, components),
        save_checkpoint,
        *adapter_exports(trainer, components),
        *samples(trainer, components, renderer, save_checkpoint),
        HandleRequests(trainer, save_checkpoint),
        EmitMetrics(trainer, components.previous_steps),
        WriteReport(trainer.services),
    ]


def adapter_exports(trainer: Trainer, components: RunComponents) -> list[StepCallback]:
    """Return what exports the adapter while the run trains, if the options ask for it."""
    if not trainer.config.export.every:
        return []
    return [ExportSteps(components, trainer.services, trainer.state)]


def samples(
    trainer: Trainer,
    components: RunComponents,
    renderer: SampleRenderer | None,
    save_checkpoint: "SaveCheckpoint",
) -> list[StepCallback]:
    """Return what draws samples while the run trains, if the options ask for it."""
    if renderer is None or not trainer.config.sample.every:
        return []
    state, services = trainer.state, trainer.services
    return [DrawSamples(renderer, components, state, services, save_checkpoint.save)]


def compilation_reports(trainer: Trainer) -> list[StepCallback]:
    """Return the report of what was compiled, if anything may be."""
    if trainer.config.compile == "none":
        return []
    return [ReportCompilation(trainer.services.reporter.say)]


def is_multiple(step: int, interval: int) -> bool:
    """Return whether something is due that happens every `interval` steps; 0 means never."""
    return interval > 0 and step % interval == 0


class CompareRanks:
    """Starts the comparison of the adapters of all processes; LogMetrics reads the result."""

    def __init__(self, trainer: Trainer):
        self.config, self.state = trainer.config, trainer.state
        self.rank_check = trainer.services.rank_check

    def before_first_step(self) -> None:
        """Nothing was trained yet."""

    def after_step(self) -> None:
        if is_multiple(self.state.step, self.config.distributed.rank_check_every):
            self.rank_check.start_comparison(self.state.step)


class LogMetrics:
    """Reads losses and gradient norms from the device, checks that they are finite, and reports
    them."""

    def __init__(self, trainer: Trainer, checkpoints: RunCheckpoints):
        self.config, self.state, self.services = trainer.config, trainer.state, trainer.services
        self.buffer, self.batches = trainer.buffer, trainer.batches
        self.checkpoints = checkpoints

    def before_first_step(self) -> None:
        """There are no losses yet."""

    def after_step(self) -> None:
        step, config = self.state.step, self.config
        if step == config.steps or step % config.tracking.log_every == 0:
            self.log()

    def log(self) -> None:
        """Read and report everything since the last log. Raises TrainingDiverged. Collective."""
        state, reporter = self.state, self.services.reporter
        first_step = len(state.history.grad_norms)
        self.services.rank_check.finish_comparison()
        losses, norms = self.buffer.read(self.services.accelerator)
        preservation = self.buffer.read_preservation(self.services.accelerator)
        self._check_finite(losses, norms, first_step)
        if not norms:
            return
        state.history.add_steps(losses, norms)
        loss = finite_mean(losses)
        samples_per_step = self.config.batch_size * state.micro_batches_per_step
        learning_rate = scheduled_learning_rate(
            self.config, state.step - 1, state.micro_batches_per_step
        )
        memory = self.services.memory.metrics()
        reporter.row |= {
            **memory,
            "train/loss": loss,
            "train/lr": learning_rate,
            "train/grad_norm": norms[-1],
            "train/data_wait": self.batches.timer.share,
            "train/steps_per_second": reporter.speed,
            "train/samples_per_second": reporter.speed * samples_per_step,
            "train/skipped_steps": len(state.history.skipped_steps),
        }
        if preservation is not None:
            reporter.row["train/preservation"] = preservation
        shown = {"loss": f"{loss:.4f}", "lr": f"{learning_rate:.2e}"}
        if "memory/gpu_peak" in memory:
            shown["gpu_peak"] = f"{memory['memory/gpu_peak']:.1f}GiB"
        reporter.show(**shown)

    def _check_finite(self, losses: list[float], norms: list[float], first_step: int) -> None:
        per_step = self.state.micro_batches_per_step
        for index, norm in enumerate(norms):
            step_losses = losses[index * per_step : (index + 1) * per_step]
            checked_values = [norm]
            if self.config.optim.on_non_finite != "skip":
                checked_values += step_losses
            if not is_finite(checked_values):
                self._handle_non_finite(first_step + index, step_losses, norm)

    def _handle_non_finite(self, step: int, losses: list[float], norm: float) -> None:
        """Record a skipped step. Raises TrainingDiverged unless it may be skipped. `step`: counted
        from 0."""
        names = self.batches.sample_names(step, self.state.micro_batches_per_step)
        message = (
            f"step {step + 1} is not finite: losses {losses}, gradient norm {norm}\n"
            f"  its samples: {', '.join(names)}"
        )
        skipped_steps, optim = self.state.history.skipped_steps, self.config.optim
        skipped_steps.append(step + 1)
        if optim.on_non_finite == "skip":
            if len(skipped_steps) < optim.max_skipped_steps:
                self.services.reporter.say(f"skipped: {message}")
                return
            message += f"\n  {len(skipped_steps)} steps were skipped, the limit of --optim.max_skipped_steps"
        self.checkpoints.writer.finish(self.services.reporter.say)
        last_checkpoint: Path | str = "none"
        paths = checkpoint_paths(self.services.folder / CHECKPOINTS)
        if paths:
            last_checkpoint = paths[-1]
        raise TrainingDiverged(
            f"{message}\n  last good checkpoint: {last_checkpoint}\n"
            "  A lower --learning_rate, warm-up, or --training_dtype fp32 usually helps"
        )


class Validate:
    """Validates before the first step, periodically, and after the last step, if there are held-out
    images."""

    def __init__(self, trainer: Trainer, components: RunComponents):
        self.config, self.state, self.services = trainer.config, trainer.state, trainer.services
        self.loss_function, self.components = trainer.loss_function, components
        self.dataset = components.datasets.validation

    def before_first_step(self) -> None:
        self.after_step()

    def after_step(self) -> None:
        if self.dataset is None or not self._is_due():
            return
        state, reporter = self.state, self.services.reporter
        phase = self.services.memory.phase(VALIDATION)
        with phase, self.services.ema.applied(), announced("validating"):
            result = validate(
                self.services.accelerator,
                self.components.adapted.model,
                self.loss_function.for_validation,
                self.dataset,
                self.config,
                self.services.requests.must_stop,
            )
        state.validation_interrupted = result is None
        if result is None:
            return
        if result.non_finite_rows:
            self._report_non_finite([self.dataset.name(row) for row in result.non_finite_rows])
        state.history.validation.append({"step": state.step, **result.losses})
        if self.config.keeps_best_weights and best_step(state.history.validation) == state.step:
            state.best = BestWeights(state.step, self.services.ema.evaluation_state())
        reporter.row |= {f"validation/{name}": loss for name, loss in result.losses.items()}
        reporter.say(f"validation loss at step {state.step}: {result.losses['loss']:.5f}")

    def _is_due(self) -> bool:
        step, interval = self.state.step, self.config.validation.every
        validated_steps = [entry["step"] for entry in self.state.history.validation]
        if step in validated_steps:
            return False
        is_first_or_last = step in (0, self.config.steps)
        return is_first_or_last or is_multiple(step, interval)

    def _report_non_finite(self, names: list[str]) -> None:
        """Print the images. Raises TrainingDiverged before the first step, because training cannot
        help."""
        shown_names = ", ".join(names[:MAX_NAMED_IMAGES])
        if len(names) > MAX_NAMED_IMAGES:
            shown_names += f" and {len(names) - MAX_NAMED_IMAGES} more"
        message = f"the validation loss at step {self.state.step} is not finite for {shown_names}"
        if self.state.step == 0:
            raise TrainingDiverged(
                f"{message}\n  Nothing was trained yet: latents or conditioning of these images "
                "are not finite, or the model overflows. Remove the images, or try "
                "--training_dtype fp32"
            )
        self.services.reporter.say(message)


class SaveCheckpoint:
    """Saves periodically and after the last step."""

    def __init__(self, trainer: Trainer, checkpoints: RunCheckpoints, log_metrics: LogMetrics):
        self.config, self.state, self.services = trainer.config, trainer.state, trainer.services
        self.checkpoints, self.log_metrics = checkpoints, log_metrics

    def before_first_step(self) -> None:
        """Nothing was trained yet."""

    def after_step(self) -> None:
        config, step = self.config, self.state.step
        is_last = step == config.steps
        if stops_early(self.state.history.validation, config.validation):
            is_last = True
        if is_last and config.distributed.rank_check_every:
            self.services.rank_check.start_comparison(step)
        if is_last or is_multiple(step, config.checkpoint.every):
            self.save()
        self.checkpoints.writer.check()

    def save(self) -> None:
        """Start to write a checkpoint, unless this step has one. Collective.

        Losses are read first, so that weights that are not finite are never saved."""
        state, services = self.state, self.services
        is_saved = state.saved_step == state.step
        if not is_saved:
            self.log_metrics.log()
        if not state.validation_interrupted:
            previous_steps = self.checkpoints.components.previous_steps
            services.reporter.emit(previous_steps + state.step)
        if is_saved:
            return
        self.checkpoints.save(state)
        state.saved_step = state.step
        services.requests.note_checkpoint()


class HandleRequests:
    """Saves or stops if a signal, a file or the clock asks for it, on any process."""

    def __init__(self, trainer: Trainer, save_checkpoint: SaveCheckpoint):
        self.trainer, self.save_checkpoint = trainer, save_checkpoint

    def before_first_step(self) -> None:
        self.after_step()

    def after_step(self) -> None:
        request = self.trainer.services.requests.collect()
        if request is not StopRequest.NONE:
            self.save_checkpoint.save()
        if request.stops:
            self.save_checkpoint.checkpoints.writer.wait()
            stop_run(request, self.trainer)


def stop_run(request: StopRequest, trainer: Trainer) -> None:
    """End the run, whose step is saved, by raising RunStopped."""
    services = trainer.services
    outcome = f"saved step {trainer.state.step} of {trainer.config.steps}"
    if request is StopRequest.REQUEUE and services.process.is_main:
        outcome += f"; {requeue_job()}"
    finish_trackers(services.accelerator)  # last, because it may wait for the network
    raise RunStopped(request, outcome, is_agreed=True)


class EmitMetrics:
    """Writes the metrics of the step to metrics.jsonl and the tracker."""

    def __init__(self, trainer: Trainer, previous_steps: int):
        self.state, self.reporter = trainer.state, trainer.services.reporter
        self.previous_steps = previous_steps

    def before_first_step(self) -> None:
        self.after_step()

    def after_step(self) -> None:
        self.reporter.emit(self.previous_steps + self.state.step)
