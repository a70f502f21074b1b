"""Saves a run as a checkpoint, and resumes it from the newest valid one, with any number of
processes."""

import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from threading import Thread

from accelerate.utils import broadcast_object_list

from common.atomic import write_file
from common.errors import ConfigError, bullet_list
from common.hashing import hash_of_files
from training.assistant import files_of_assistant
from training.checkpoints import storage
from training.checkpoints.best import BestWeights, best_step
from training.checkpoints.state import (
    ADAPTER_FILE,
    BEST_FILE,
    EMA_FILE,
    OPTIMIZER_FILE,
    SavedState,
    state_of,
    to_files,
    weights_of,
)
from training.checkpoints.storage import Checkpoint
from training.checkpoints.writer import CheckpointWriter
from training.components import RunComponents
from training.config import TrainConfig, to_yaml
from training.distributed.accelerator import DistributedError
from training.distributed.engine import Engine
from training.reporting.history import History
from training.reporting.sample_log import truncate_logs
from training.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    NEW_FOLDER_HINT,
    clear_run,
    config_hash,
    is_restart,
    write_launcher_id,
)
from training.services import RunServices
from training.train_state import TrainState
from training.validation import comparison_key

SHARED_WITHIN = 30.0
"""Seconds in which all nodes must see the same files."""


def hash_in_background(components: RunComponents) -> Future[str]:
    """Hash the files of the base model in a thread, which does not delay the end of the process.

    The hash takes a while if it is not cached, and only checkpoints need it."""
    files = components.family.identity_files("denoiser")
    cache_dir = Path(components.config.data.cache_dir)
    future = Future[str]()

    def compute() -> None:
        try:
            future.set_result(hash_of_files(files, cache_dir))
        except BaseException as error:  # raised where the hash is used
            future.set_exception(error)

    Thread(target=compute, daemon=True).start()
    return future


IDENTITY_CHANGES = {
    "config": "the options have changed",
    "dataset": "the images, captions or other data have changed",
    "base model": "the files of the base model have changed",
    "assistant LoRA": "the file of --model.assistant_lora has changed",
    "steps of the existing LoRA": "the adapter of --existing_lora was trained for another number of steps",
}
"""Fact of `RunCheckpoints.identity` -> its change, in words."""


class RunCheckpoints:
    """Saves and resumes one run. All methods are collective; the main process writes."""

    def __init__(self, components: RunComponents, engine: Engine, services: RunServices):
        self.config, self.components = components.config, components
        self.engine, self.services = engine, services
        self.folder = services.folder / CHECKPOINTS
        self.writer = CheckpointWriter(self.folder, self.config.checkpoint.keep)
        self.base_hash: Future[str] | None = None
        if services.process.is_main:
            self.base_hash = hash_in_background(components)

    def save(self, state: TrainState) -> None:
        """Copy the state, and start to write it as a checkpoint; `writer.wait()` waits for the end.

        No other process waits for the main process."""
        optimizer = self.engine.optimizer_state()
        if not self.services.process.is_main:
            return
        self.writer.wait()  # so that one copy at a time is in memory
        saved_state = SavedState(
            step=state.step,
            steps=self.config.steps,
            samples=state.step * state.micro_batches_per_step * self.config.batch_size,
            micro_batches_per_step=state.micro_batches_per_step,
            grad_accumulation_steps=self.config.grad_accumulation_steps,
            identity=self.identity(),
            started_at=state.started_at,
            tracker_id=self.services.reporter.tracker_id,
            history=asdict(state.history),
            row=self.services.reporter.row,
            best_step=state.best.step if state.best else None,
        )
        weights = {
            ADAPTER_FILE: self.components.adapted.state_dict(),
            EMA_FILE: self.services.ema.state_dict(),
            BEST_FILE: state.best.weights if state.best else {},
        }
        files = to_files(saved_state, weights, self.components.adapted.alphas(), optimizer)
        self.writer.start(state.step, files)

    def identity(self) -> dict[str, object]:
        """Return facts that must not change, because the next step depends on them. Main process
        only."""
        assert self.base_hash is not None
        facts: dict[str, object] = {
            "config": config_hash(self.config),
            "dataset": self.components.datasets.train.content_hash,
            "base model": self.base_hash.result(),
            "steps of the existing LoRA": self.components.previous_steps,
        }
        assistant = self.config.model.assistant_lora
        if assistant is not None:
            files = files_of_assistant(assistant)
            facts["assistant LoRA"] = hash_of_files(files, Path(self.config.data.cache_dir))
        return facts

    def resume(self) -> TrainState:
        """Return the state of the newest valid checkpoint and load its weights, or return the state
        of a new run."""
        services = self.services
        if services.process.is_main:
            if self.config.overwrite and not is_restart(services.folder):
                clear_run(services.folder)
            write_launcher_id(services.folder)
        services.accelerator.wait_for_everyone()
        checkpoint = self._agreed_checkpoint()
        previous_steps = self.components.previous_steps
        if checkpoint is None:
            state = self._new_state(services.process.count * self.config.grad_accumulation_steps)
            last_step = services.reporter.resume(-1, {})
        else:
            saved_state = state_of(checkpoint)
            state = self._restore(checkpoint, saved_state)
            last_step = services.reporter.resume(previous_steps + state.step, saved_state.row)
            services.record.print(f"resumed at step {state.step} of {self.config.steps}")
        if services.process.is_main:
            truncate_logs(services.folder, state.step)
            write_file(services.folder / CONFIG_FILE, to_yaml(self.config))
            first_step = previous_steps + state.step
            is_resumed = checkpoint is not None
            services.record.start_steps(first_step, last_step, previous_steps, is_resumed)
        services.accelerator.wait_for_everyone()
        return state

    def _new_state(self, micro_batches_per_step: int) -> TrainState:
        history = History(micro_batches_per_step)
        dataset = self.components.datasets.validation
        if dataset is not None:
            history.start_series(comparison_key(dataset, self.config))
        return TrainState(0, micro_batches_per_step, time.time(), history)

    def _agreed_checkpoint(self) -> Checkpoint | None:
        """Return the newest valid checkpoint that the main process sees. The others must see the
        same one."""
        process = self.services.process
        checkpoint: Checkpoint | None = None
        agreed: list[tuple[int, str] | None] = [None]
        if process.is_main:
            checkpoint, messages = storage.load_newest(self.folder)
            for message in messages:
                self.services.reporter.say(f"note: {message}. An earlier checkpoint is used")
            agreed = [None if checkpoint is None else (checkpoint.step, checkpoint.manifest_hash)]
        if process.count > 1:
            broadcast_object_list(agreed)
        if process.is_main or agreed[0] is None:
            return checkpoint
        return self._wait_for_checkpoint(*agreed[0])

    def _wait_for_checkpoint(self, step: int, manifest_hash: str) -> Checkpoint:
        """Return the checkpoint that the main process chose, once this node sees it."""
        deadline = time.monotonic() + SHARED_WITHIN
        while True:
            try:
                checkpoint = storage.load(storage.checkpoint_path(self.folder, step))
                if checkpoint.manifest_hash == manifest_hash:
                    return checkpoint
            except (OSError, storage.DamagedError):
                pass
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"{self.folder} is not the same folder on all nodes: rank "
                    f"{self.services.process.index} does not see the checkpoint of step {step} as "
                    "the main process does. Use an --output_dir on a shared disk"
                )
            time.sleep(0.5)

    def _restore(self, checkpoint: Checkpoint, saved: SavedState) -> TrainState:
        """Load weights and optimizer, and return the state. Raises ConfigError for another run's
        checkpoint."""
        say = self.services.reporter.say
        if checkpoint.step > self.config.steps:
            raise ConfigError(
                f"--steps {self.config.steps}: the run in {self.services.folder} is already at "
                f"step {checkpoint.step}. Use a larger number"
            )
        for note in schedule_notes(saved, self.config):
            say(note)
        micro_batches_per_step = self._resumed_micro_batches(saved)
        self._check_same_run(checkpoint, saved, micro_batches_per_step)
        self.engine.load(
            weights_of(checkpoint, ADAPTER_FILE),
            storage.optimizer_from_bytes(checkpoint.files[OPTIMIZER_FILE]),
        )
        self.services.ema.load_state_dict(weights_of(checkpoint, EMA_FILE))
        self.services.reporter.tracker_id = saved.tracker_id
        history = History.from_dict(saved.history)
        dataset = self.components.datasets.validation
        if dataset is not None and history.start_series(comparison_key(dataset, self.config)):
            say(
                "note: the validation images or options have changed, so a new series of "
                "validation losses begins"
            )
        state = TrainState(
            checkpoint.step,
            micro_batches_per_step,
            saved.started_at,
            history,
            saved_step=checkpoint.step,
        )
        if self.config.keeps_best_weights:
            self._restore_best(state, checkpoint, saved)
        return state

    def _resumed_micro_batches(self, saved: SavedState) -> int:
        """Return the micro-batches per step: those of the earlier steps, if the processes can share
        them."""
        num_processes, accumulation = (
            self.services.process.count,
            self.config.grad_accumulation_steps,
        )
        configured = num_processes * accumulation
        per_step = saved.micro_batches_per_step
        has_same_option = saved.grad_accumulation_steps == accumulation
        if per_step == configured or not has_same_option or per_step % num_processes:
            return configured
        self.services.reporter.say(
            f"the earlier steps had {per_step} micro-batches per step, and so have the next ones: "
            f"grad_accumulation_steps is {per_step} / {num_processes} processes = "
            f"{per_step // num_processes}"
        )
        return per_step

    def _check_same_run(
        self, checkpoint: Checkpoint, saved: SavedState, micro_batches_per_step: int
    ) -> None:
        """Raise ConfigError, on the main process too, if the checkpoint belongs to a different run."""
        facts = self.identity() if self.services.process.is_main else {}
        differences = [
            IDENTITY_CHANGES[name]
            for name, value in facts.items()
            if saved.identity.get(name) != value
        ]
        if saved.micro_batches_per_step != micro_batches_per_step:
            differences.append(
                "micro-batches per step (processes x grad_accumulation_steps) are "
                f"{saved.micro_batches_per_step} there, {micro_batches_per_step} here"
            )
        if differences:
            heading = (
                f"--output_dir {self.services.folder}: its checkpoint of step {checkpoint.step} belongs "
                "to a different run"
            )
            raise ConfigError(bullet_list(heading, differences) + f"\n{NEW_FOLDER_HINT}")

    def _restore_best(self, state: TrainState, checkpoint: Checkpoint, saved: SavedState) -> None:
        """Restore the weights of the best step. Raises ConfigError if the checkpoint does not have
        them."""
        validations = state.history.validation
        if saved.best_step is not None and validations:
            state.best = BestWeights(saved.best_step, weights_of(checkpoint, BEST_FILE))
        step = best_step(validations)
        if step == state.step:
            state.best = BestWeights(state.step, self.services.ema.evaluation_state())
        kept_step = state.best.step if state.best else None
        if step != kept_step:
            raise ConfigError(
                f"--checkpoint.keep_best, --export.weights best: the weights of step {step}, which "
                f"has the lowest validation loss so far, were not kept in {self.services.folder}. "
                "Leave both options out, or use --overwrite to start again there"
            )


def schedule_notes(saved: SavedState, config: TrainConfig) -> list[str]:
    """Return a note if a changed number of steps changes the learning rate."""
    scheduler = config.optim.lr_scheduler
    if saved.steps == config.steps or scheduler == "constant":
        return []
    return [
        f"note: --steps was {saved.steps} and is {config.steps}: the {scheduler} learning rate is "
        f"that of {config.steps} steps from here on"
    ]
