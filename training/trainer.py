"""One run: its steps, what happens after each of them, its checkpoints and how it goes on from one."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from data.batches import Batch, MicroBatches
from data.loader import micro_batches
from data.schedule import Schedule, key
from training.checkpoints import storage
from training.checkpoints.best import Best, best_step, is_over
from training.checkpoints.resume import base_hash, write
from training.config import TrainConfig
from training.distributed.accelerator import timeout
from training.distributed.consensus import Agreement
from training.distributed.engine import Engine
from training.distributed.rank_check import SyncCheck
from training.loss import LossFunction
from training.metadata import Parts
from training.optim.ema import Averages
from training.optim.schedule import batch_scale, learning_rate
from training.reporting import trackers
from training.reporting.history import (
    History,
    Pending,
    TrainingDiverged,
    Waiting,
    finite_mean,
    is_finite,
)
from training.reporting.reporter import Reporter
from training.reporting.sample_log import SampleLog
from training.run_folder import CHECKPOINTS
from training.stopping.requests import Requests
from training.stopping.signals import Asked, Interruptions, Stopped, requeue
from training.validation import kind_of, validate


class Run:
    """`step` is the number of optimizer steps done; everything else in a run follows from it (data/schedule.py)."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        parts: Parts,
        engine: Engine,
        loss_function: LossFunction,
        interruptions: Interruptions,
    ):
        self.config, self.accelerator, self.parts = config, accelerator, parts
        self.engine, self.loss_function = engine, loss_function
        self.folder, self.main = Path(config.output_dir), accelerator.is_main_process
        self.averages = Averages(config, engine)
        self.best: Best | None = None
        self.initial = parts.adapted.state_dict()  # what the run started from, for the preview before training
        train = parts.datasets.train
        self.schedule = Schedule(train.buckets, train.fingerprint, config.seed, config.batch_size)
        self.accumulation = config.grad_accumulation_steps
        self.history = History(self.micro_batches_per_step)
        if parts.datasets.validation is not None:
            self.history.validate_by(kind_of(parts.datasets.validation, config))
        self.pending, self.waiting = Pending(), Waiting()
        self.step = self.micro_step = 0
        self.started_at = time.time()
        self.reporter = Reporter(accelerator, self.folder, trackers.new_id())
        self.samples = SampleLog(self.folder, accelerator.process_index) if config.tracking.samples else None
        self.saved_step: int | None = None
        self.unvalidated = False  # the validation of this step was interrupted
        self.agreement = Agreement(accelerator, timeout(config))
        self.sync_check = SyncCheck(engine.denoiser, engine.names, self.agreement)
        self.requests = Requests(self.agreement, interruptions, self.folder, config.checkpoint.every_minutes, self.main)
        options = config.adapter
        self.drops = bool(options.dropout or options.rank_dropout or options.module_dropout)
        self.base = base_hash(parts.family, config) if self.main else None

    @property
    def micro_batches_per_step(self) -> int:
        return self.accelerator.num_processes * self.accumulation

    @property
    def total_batch_size(self) -> int:
        return self.config.batch_size * self.micro_batches_per_step

    @property
    def total_steps(self) -> int:
        return self.parts.previous_steps + self.step

    @property
    def stops_early(self) -> bool:
        """Whether validation has shown that more steps bring nothing; the same on all ranks, which know its losses."""
        return is_over(self.history.validation, self.config.validation)

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the current step to the last, on its device."""
        config, per_step, rank = self.config, self.micro_batches_per_step, self.accelerator.process_index
        numbers = range(self.step * per_step + rank, config.steps * per_step, self.accelerator.num_processes)
        device = self.accelerator.device
        self.validate_if_due()
        self.answer()
        self.reporter.bar(config.steps, self.step)
        source = MicroBatches(self.parts.datasets.train, self.schedule, config.objective, per_step)
        loader = micro_batches(source, numbers, config.data.num_workers, device.type == "cuda")
        for number in numbers:
            if self.stops_early:
                self.reporter.say(f"stops early at step {self.step} of {config.steps}: {config.validation.patience} "
                                  "validations without improvement")  # fmt: skip
                break
            with self.waiting.for_data():
                batch = next(loader)
            if self.samples is not None:
                self.samples.add(self.step + 1, self.schedule.rows(number), batch)
            if self.drops:
                torch.manual_seed(key("dropout", config.seed, number))
            yield batch.to(device)
        self.reporter.close()

    def train_on(self, batch: Batch) -> None:
        """One micro-step; the last one of a step updates the weights and does what is due."""
        self.micro_step += 1
        last = self.micro_step % self.accumulation == 0
        if last:
            self.requests.post()
        with self.engine.accumulating(last):
            loss = self.loss_function(self.engine.denoiser, batch).mean()
            self.engine.backward(loss / self.accumulation, last)
        self.pending.losses.append(loss.detach())
        if last:
            self._update()
            self._after_step()

    def rate(self, step: int) -> float:
        """The learning rate of update number `step`."""
        optim, scale = self.config.optim, batch_scale(self.config.optim, self.total_batch_size)
        return learning_rate(step, self.config.learning_rate * scale, self.config.steps, optim)

    def _update(self) -> None:
        self.sync_check.gradients()
        self.pending.norms.append(self.engine.update(self.rate(self.step)))
        self.step += 1
        self.averages.update(self.step)
        self.reporter.advance()

    def _after_step(self) -> None:
        config, step = self.config, self.step
        last = step == config.steps
        every = config.distributed.check_every
        if every and (last or step % every == 0):
            self.sync_check.start(step)
        if last or step % config.tracking.log_every == 0:
            self.log()
        self.validate_if_due()
        if self.stops_early and not last:
            last = True
            if every:
                self.sync_check.start(step)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            self.save()
        self.answer()

    def answer(self) -> None:
        """Does what signals, the clock or the user asked for, on any rank."""
        asked = self.requests.next()
        if asked:
            self.save()
        else:
            self.reporter.emit(self.total_steps)
        if asked.leaves:
            self.leave(asked)

    def leave(self, asked: Asked) -> None:
        """Ends the run, whose step is on the disk."""
        done = f"saved step {self.step} of {self.config.steps}"
        if asked is Asked.REQUEUE and self.main:
            done += f"; {requeue()}"
        trackers.finish(self.accelerator)  # last: it may take its time over the network
        raise Stopped(asked, done, agreed=True)

    def log(self) -> None:
        """Reads the losses since the last log from the device, checks and reports them. Collective."""
        first = len(self.history.grad_norms)
        self.sync_check.finish()
        losses, norms = self.pending.read(self.accelerator)
        self._check_finite(losses, norms, first)
        if not norms:
            return
        self.history.add(losses, norms)
        loss, rate, speed = finite_mean(losses), self.rate(self.step - 1), self.reporter.speed
        self.reporter.row |= {
            "train/loss": loss, "train/lr": rate, "train/grad_norm": norms[-1], "train/data_wait": self.waiting.share,
            "train/steps_per_second": speed, "train/samples_per_second": speed * self.total_batch_size,
            "train/skipped_steps": len(self.history.skipped),
        }  # fmt: skip
        self.reporter.show(loss=f"{loss:.4f}", lr=f"{rate:.2e}")

    def _check_finite(self, losses: list[float], norms: list[float], first: int) -> None:
        n, optim = self.micro_batches_per_step, self.config.optim
        for i, norm in enumerate(norms):
            values = losses[i * n : (i + 1) * n]
            skips = optim.non_finite == "skip"
            if is_finite([norm] if skips else [*values, norm]):
                continue
            step = first + i
            rows = [row for m in range(step * n, (step + 1) * n) for row in self.schedule.rows(m)]
            names = [self.parts.datasets.train.name(row) for row in rows]
            fault = f"step {step + 1} is not finite: losses {values}, gradient norm {norm}\n  its samples: "
            fault += ", ".join(names)
            self.history.skipped.append(step + 1)
            if skips and len(self.history.skipped) < optim.non_finite_limit:
                self.reporter.say(f"skipped: {fault}")
                continue
            if skips:
                fault += f"\n  as many steps were skipped as --optim.non_finite_limit allows, {optim.non_finite_limit}"
            kept = storage.existing(self.folder / CHECKPOINTS)
            raise TrainingDiverged(
                f"{fault}\n  last good checkpoint: {kept[-1] if kept else 'none'}\n"
                "  A lower --learning_rate, warm-up, or --training_dtype fp32 usually helps"
            )

    def validate_if_due(self) -> None:
        """Validation loss per quantile, if there are held-out images; before the first step, after the last, and every
        so many. What is interrupted is done by the next sitting. Collective."""
        config, dataset = self.config, self.parts.datasets.validation
        every = config.validation.every
        due = self.step in (0, config.steps) or (every and self.step % every == 0)
        if not due or dataset is None or self.step in (entry["step"] for entry in self.history.validation):
            return
        with self.averages.shown():
            found = validate(
                self.accelerator, self.parts.adapted.model, self.loss_function.for_validation, dataset, config,
                self.requests.leaving,
            )  # fmt: skip
        self.unvalidated = found is None
        if found is None:
            return
        losses = found.losses
        if found.not_finite:
            self._report_not_finite([dataset.name(row) for row in found.not_finite])
        self.history.validation.append({"step": self.step, **losses})
        self.keep_if_best()
        self.reporter.row |= {f"validation/{name}": loss for name, loss in losses.items()}
        self.reporter.say(f"validation loss at step {self.step}: {losses['loss']:.5f}")

    def _report_not_finite(self, names: list[str]) -> None:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        fault = f"the validation loss at step {self.step} is not finite, of {', '.join(names[:5])}{more}"
        if self.step == 0:  # no training can help
            raise TrainingDiverged(
                f"{fault}\n  Nothing was trained yet: latents or conditioning of these are not finite, or the model "
                "overflows. Leave them out, or try --training_dtype fp32"
            )
        self.reporter.say(fault)

    def keep_if_best(self) -> None:
        """Keeps a copy of the weights as they are shown, if no validation loss was lower than that of this step."""
        if self.config.keeps_best and best_step(self.history.validation) == self.step:
            with self.averages.shown():
                self.best = Best(self.step, self.parts.adapted.state_dict())

    def save(self) -> None:
        """Writes a checkpoint. Reads the losses first: what is not finite is never kept. Collective."""
        if self.saved_step == self.step:
            self.reporter.emit(self.total_steps)
            return
        self.log()
        if not self.unvalidated:
            self.reporter.emit(self.total_steps)
        write(self)
        self.saved_step = self.step
        self.requests.saved()
