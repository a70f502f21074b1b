"""The training loop: micro-batches, updates, and after each step the callbacks in their order."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from common.announce import announced
from data.batches import Batch
from data.prompts import NEUTRAL
from training.batch_stream import BatchStream
from training.checkpoints.best import stops_early
from training.config import TrainConfig
from training.distributed.engine import Engine
from training.loss import LossFunction
from training.memory.phase_memory import TRAINING
from training.optim.schedule import scheduled_learning_rate
from training.reporting.history import LossBuffer
from training.services import RunServices
from training.slider_loss import SliderLoss
from training.train_state import TrainState


class StepCallback(Protocol):
    """An action before the first step and after each step. All processes call it, so it may be
    collective."""

    def before_first_step(self) -> None:
        """WHEN: once, before the first step of a new or resumed run."""

    def after_step(self) -> None:
        """WHEN: after each step; `state.step` counts the steps done. Raise RunStopped to end the
        run."""


class Trainer:
    """Trains the adapters from the step of `state` to the last step."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        loss_function: LossFunction,
        batches: BatchStream,
        state: TrainState,
        services: RunServices,
    ):
        self.config, self.engine, self.loss_function = config, engine, loss_function
        self.batches, self.state, self.services = batches, state, services
        self.slider_loss: SliderLoss | None = None
        slider = config.objective.slider
        if slider.targets:
            self.slider_loss = SliderLoss(loss_function, slider)
        self.buffer = LossBuffer()
        self.has_begun = False
        self.callbacks: Sequence[StepCallback] = ()
        """Called in this order; `step_callbacks` in training/callbacks.py makes the list."""

    def train(self) -> None:
        """Take all remaining steps.

        Raises RunStopped after a request to stop."""
        memory = self.services.memory
        with memory.phase(TRAINING):
            self._train()

    def _train(self) -> None:
        state, reporter = self.state, self.services.reporter
        for callback in self.callbacks:
            callback.before_first_step()
        reporter.show_progress(self.config.steps, state.step)
        batches = self.batches.from_step(state.step, state.micro_batches_per_step)
        while state.step < self.config.steps:
            if stops_early(state.history.validation, self.config.validation):
                reporter.say(
                    f"stopped early at step {state.step} of {self.config.steps}: "
                    f"{self.config.validation.patience} validations without improvement"
                )
                break
            with self._announced_if_first():
                self.train_step(batches)
            for callback in self.callbacks:
                callback.after_step()
        reporter.close()

    def _announced_if_first(self) -> AbstractContextManager:
        """Announce the first step of this process, which fetches data, and may compile."""
        if self.has_begun:
            return nullcontext()
        self.has_begun = True
        return announced("the first step")

    def _losses(self, batch: Batch) -> Tensor:
        """Return the losses (B,) of a micro-batch."""
        if self.slider_loss is not None:
            return self.slider_loss(self.engine.denoiser, self.engine.adapted, batch)
        return self.loss_function(self.engine.denoiser, batch)

    def _strength_of(self, batch: Batch) -> AbstractContextManager:
        """Return the context of a micro-batch's forward and backward pass."""
        if batch.strength == 1:
            return nullcontext()
        return self.engine.adapted.at_strength(batch.strength)

    def _train_on(self, batch: Batch, is_last: bool, num_micro_batches: int) -> None:
        """Add the gradients of a micro-batch. `is_last`: of the step."""
        engine = self.engine
        preserves = NEUTRAL in batch.prompts
        is_last_pass = is_last and not preserves
        with self._strength_of(batch):
            with engine.accumulating(is_last_pass):
                loss = self._losses(batch).mean()
                engine.backward(loss / num_micro_batches, is_last_pass)
            self.buffer.losses.append(loss.detach())
            if preserves:
                self._preserve(batch, is_last, num_micro_batches)

    def _preserve(self, batch: Batch, is_last: bool, num_micro_batches: int) -> None:
        """Add the gradients of the preservation loss of a micro-batch."""
        engine = self.engine
        weight = self.config.objective.preserve.weight
        with engine.accumulating(is_last):
            differences = self.loss_function.preservation(
                engine.denoiser,
                engine.adapted,
                batch,
            )
            loss = differences.mean()
            engine.backward(weight * loss / num_micro_batches, is_last)
        self.buffer.preservation.append(loss.detach())

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Add up the gradients of a step's micro-batches, then update the weights. Reads nothing
        from the device."""
        state, services = self.state, self.services
        num_micro_batches = state.micro_batches_per_step // services.accelerator.num_processes
        for index in range(num_micro_batches):
            is_last = index == num_micro_batches - 1
            batch = next(batches)
            if is_last:
                services.requests.post()  # hidden behind the last backward pass
            self._train_on(batch, is_last, num_micro_batches)
        services.rank_check.check_gradients()
        learning_rate = scheduled_learning_rate(
            self.config, state.step, state.micro_batches_per_step
        )
        self.buffer.norms.append(self.engine.update(learning_rate))
        state.step += 1
        services.ema.update(state.step)
        services.reporter.advance()
