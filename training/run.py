"""One run: its counters, and what happens after each backward pass, at each log, at each checkpoint and at the end."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from data.batches import Batch, micro_batches
from data.schedule import Schedule, key
from training import checkpoint, export, preview, tracking
from training.config import TrainConfig, to_yaml
from training.files import write_file
from training.metadata import Parts, Provenance
from training.metrics import History, Pending, TrainingDiverged, Waiting, loss_json, loss_png
from training.optim import learning_rate
from training.rundir import CHECKPOINTS, CONFIG_FILE, clear
from training.step import LossFunction
from training.validation import validate


class Run:
    """`step` is the number of optimizer steps done; everything else in a run follows from it (data/schedule.py)."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        parts: Parts,
        denoiser: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: LossFunction,
    ):
        self.config, self.accelerator, self.parts = config, accelerator, parts
        self.denoiser, self.optimizer, self.loss_function = denoiser, optimizer, loss_function
        self.folder = Path(config.output_dir)
        self.trained = list(parts.adapted.named_parameters().values())
        self.initial = parts.adapted.state_dict()  # what the run started from, for the preview before training
        train = parts.datasets.train
        self.schedule = Schedule(train.buckets, train.fingerprint, config.seed, config.batch_size)
        self.micro_batches_per_step = accelerator.num_processes * config.grad_accumulation_steps
        self.history = History(self.micro_batches_per_step)
        self.pending, self.waiting = Pending(), Waiting()
        self.step = 0
        self.started_at = time.time()
        self.tracker_id = tracking.new_id()
        self.progress: tqdm | None = None
        options = config.adapter
        self.drops = bool(options.dropout or options.rank_dropout or options.module_dropout)

    @property
    def total_batch_size(self) -> int:
        return self.config.batch_size * self.micro_batches_per_step

    @property
    def total_steps(self) -> int:
        return self.parts.previous_steps + self.step

    def resume(self) -> None:
        """Goes on from the newest valid checkpoint of output_dir, if there is one. Collective."""
        if self.config.overwrite and self.accelerator.is_main_process:
            clear(self.folder)
        self.accelerator.wait_for_everyone()
        found, damaged = checkpoint.newest(self.folder / CHECKPOINTS)
        for fault in damaged:
            self.accelerator.print(f"passed over: {fault}")
        if found is not None:
            self._restore(found)
            self.accelerator.print(f"resumed at step {self.step} of {self.config.steps}")
        if self.accelerator.is_main_process:
            write_file(self.folder / CONFIG_FILE, to_yaml(self.config))

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        state = json.loads(found.files["state.json"])
        here = self._identity()
        differing = [f"{k}: {state['identity'].get(k)} there, {v} here" for k, v in here.items()
                     if state["identity"].get(k) != v]  # fmt: skip
        if differing:
            raise checkpoint.CheckpointError(
                "\n  ".join([f"the checkpoint of step {found.step} in {self.folder} is of a different run", *differing])
                + "\nChoose another --output_dir, or give --overwrite to start again there"
            )
        self.parts.adapted.load_state_dict(checkpoint.tensors_from_bytes(found.files["adapter.safetensors"]))
        self.optimizer.load_state_dict(checkpoint.from_bytes(found.files["optimizer.pt"]))
        self.history = History(**state["history"])
        self.step, self.started_at, self.tracker_id = found.step, state["started_at"], state["tracker_id"]

    def _identity(self) -> dict[str, object]:
        """Facts that must be the same for the next step to be the one that would have come."""
        return {
            "dataset": self.parts.datasets.train.fingerprint,
            "micro-batches per step (processes x grad_accumulation_steps)": self.micro_batches_per_step,
            "steps of the existing LoRA": self.parts.previous_steps,
        }

    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the current step to the last, on its device."""
        per_step, rank = self.micro_batches_per_step, self.accelerator.process_index
        numbers = range(self.step * per_step + rank, self.config.steps * per_step, self.accelerator.num_processes)
        device = self.accelerator.device
        if self.step == 0:
            self.validate()
        hidden = not self.accelerator.is_main_process
        self.progress = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=hidden)
        loader = micro_batches(
            self.parts.datasets.train, self.schedule, numbers, self.config.data.num_workers, device.type == "cuda"
        )
        for number in numbers:
            with self.waiting.for_data():
                batch = next(loader)
            if self.drops:
                torch.manual_seed(key("dropout", self.config.seed, number))
            yield batch.to(device)
        self.progress.close()

    def after_backward(self, loss: Tensor) -> None:
        """Keeps the loss; after the last micro-batch of a step, updates the weights and does what is due."""
        self.pending.losses.append(loss.detach())
        if not self.accelerator.sync_gradients:
            return
        config = self.config
        limit = config.optim.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.trained, limit)
        assert norm is not None
        self.pending.norms.append(norm.detach())
        rate = learning_rate(self.step, config.learning_rate, config.steps, config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        assert self.progress is not None
        self.progress.update()
        last = self.step == config.steps
        if last or self.step % config.tracking.log_every == 0:
            self.log(rate)
        if last or (config.validation.every and self.step % config.validation.every == 0):
            self.validate()
        if last or (config.checkpoint.every and self.step % config.checkpoint.every == 0):
            self.save()

    def log(self, rate: float) -> None:
        """Reads the losses since the last log from the device, checks and reports them. Collective."""
        first = len(self.history.grad_norms)
        losses, norms = self.pending.read(self.accelerator)
        self._check_finite(losses, norms, first)
        if not norms:
            return
        self.history.micro_losses += losses
        self.history.grad_norms += norms
        loss = sum(losses) / len(losses)
        assert self.progress is not None
        self.progress.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.2e}")
        speed = self.progress.format_dict["rate"] or 0.0
        values = {"train/loss": loss, "train/lr": rate, "train/grad_norm": norms[-1]}
        values["train/data_wait"] = self.waiting.share
        self.accelerator.log(
            {**values, "train/steps_per_second": speed, "train/samples_per_second": speed * self.total_batch_size},
            step=self.total_steps,
        )

    def _check_finite(self, losses: list[float], norms: list[float], first: int) -> None:
        n = self.micro_batches_per_step
        for i, norm in enumerate(norms):
            values = losses[i * n : (i + 1) * n]
            if all(abs(v) < float("inf") for v in (*values, norm)):  # False for NaN too
                continue
            step = first + i
            rows = [row for m in range(step * n, (step + 1) * n) for row in self.schedule.rows(m)]
            names = [self.parts.datasets.train.name(row) for row in rows]
            kept = checkpoint.existing(self.folder / CHECKPOINTS)
            raise TrainingDiverged(
                f"step {step + 1} is not finite: losses {values}, gradient norm {norm}\n"
                f"  its samples: {', '.join(names)}\n  last good checkpoint: {kept[-1] if kept else 'none'}\n"
                "  A lower --learning_rate, warm-up, or --training_dtype fp32 usually helps"
            )

    def validate(self) -> None:
        """Validation loss per quantile, if there are held-out images. Collective."""
        dataset = self.parts.datasets.validation
        if dataset is None:
            return
        model = self.accelerator.unwrap_model(self.denoiser)
        losses = validate(self.accelerator, model, self.loss_function, dataset, self.config.validation.quantiles)
        self.history.validation.append({"step": self.step, **losses})
        self.accelerator.log({f"validation/{k}": v for k, v in losses.items()}, step=self.total_steps)
        message = f"validation loss at step {self.step}: {losses['loss']:.5f}"
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def save(self) -> None:
        """Writes a checkpoint. Reads the losses first: what is not finite is never kept. Collective."""
        self.log(learning_rate(self.step - 1, self.config.learning_rate, self.config.steps, self.config.optim))
        state = {
            "identity": self._identity(),
            "total_steps": self.total_steps,
            "history": asdict(self.history),
            "started_at": self.started_at,
            "tracker_id": self.tracker_id,
        }
        if self.accelerator.is_main_process:
            files = {
                "adapter.safetensors": checkpoint.tensors_to_bytes(self.parts.adapted.state_dict()),
                "optimizer.pt": checkpoint.to_bytes(self.optimizer.state_dict()),
                "state.json": json.dumps(state).encode(),
            }
            checkpoint.save(self.folder / CHECKPOINTS, self.step, files, self.config.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def export(self) -> None:
        """Writes the adapter, the loss files, the previews and, if asked for, the merged model."""
        if self.accelerator.is_main_process:
            config, parts = self.config, self.parts
            provenance = Provenance(self.total_steps, self.total_batch_size, self.started_at)
            written = export.write_adapter(config, parts, provenance)
            for name, content in (
                ("loss.json", loss_json(self.history, self.total_steps)),
                ("loss.png", loss_png(self.history)),
            ):
                write_file(self.folder / name, content)
                written.append(self.folder / name)
            if config.export.merged:
                written.append(export.write_merged(config, parts.family, parts.adapted))
            if config.preview.enabled:
                written.append(self._preview())
            self._report(written)
        self.accelerator.wait_for_everyone()

    def _preview(self) -> Path:
        parts, config = self.parts, self.config
        shown = parts.datasets.validation or parts.datasets.train
        prompts = list(config.preview.prompts) or shown.captions(4)
        pipeline = parts.family.pipeline(parts.adapted.model).to(self.accelerator.device)
        before, after = preview.before_and_after(
            parts.adapted, pipeline, self.initial, prompts, config.data.resolution, config.preview
        )
        path = self.folder / "preview.png"
        write_file(path, preview.grid_png({"before": before, "after": after}, prompts))
        tracking.log_images(self.accelerator, {"preview/before": before, "preview/after": after}, self.total_steps)
        return path

    def _report(self, written: list[Path]) -> None:
        validation = self.history.validation
        if len(validation) > 1:
            first, last = validation[0]["loss"], validation[-1]["loss"]
            print(f"validation loss: {first:.5f} -> {last:.5f} ({100 * (last / first - 1):+.1f} %)")
        print(f"waited for data: {100 * self.waiting.share:.1f} % of the training time")
        print(f"total steps: {self.parts.previous_steps} + {self.step} = {self.total_steps}")
        for path in written:
            print(f"wrote {path}")
