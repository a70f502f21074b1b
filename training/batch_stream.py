"""The micro-batches of this process, in the order of the schedule, on its device."""

from collections.abc import Iterator
from pathlib import Path

import torch

from common.process import ProcessInfo
from data.batches import Batch, MicroBatches
from data.dataset import LatentDataset
from data.loader import load_micro_batches
from data.schedule import Schedule, random_key
from training.config import TrainConfig
from training.reporting.history import DataTimer
from training.reporting.sample_log import SampleLog


class BatchStream:
    """Yields batches from any step on. Nothing has to be saved: they follow from the seed and the
    step."""

    def __init__(self, config: TrainConfig, dataset: LatentDataset, process: ProcessInfo):
        self.config = config
        self.dataset = dataset
        self.process = process
        self.schedule = Schedule(
            dataset.buckets,
            dataset.content_hash,
            config.seed,
            config.batch_size,
        )
        self.timer = DataTimer()
        self.sample_log: SampleLog | None = None
        if config.tracking.log_samples:
            self.sample_log = SampleLog(Path(config.output_dir), process.index)
        self.has_dropout = config.adapter.has_dropout

    def from_step(self, step: int, micro_batches_per_step: int) -> Iterator[Batch]:
        """Yield this process's batches from `step`, counted from 0, to the last step."""
        config, device = self.config, self.process.device
        first = step * micro_batches_per_step + self.process.index
        end = config.steps * micro_batches_per_step
        numbers = range(first, end, self.process.count)
        source = MicroBatches(
            self.dataset,
            self.schedule,
            config.objective,
            micro_batches_per_step,
        )
        loader = load_micro_batches(
            source,
            numbers,
            config.data.num_workers,
            pin_memory=device.type == "cuda",
        )
        for number in numbers:
            with self.timer.measure():
                batch = next(loader)
            if self.sample_log is not None:
                rows = self.schedule.rows(number)
                step_number = number // micro_batches_per_step + 1
                self.sample_log.add(step_number, rows, batch)
            if self.has_dropout:
                torch.manual_seed(random_key("dropout", config.seed, number))
            yield batch.to(device)

    def sample_names(self, step: int, micro_batches_per_step: int) -> list[str]:
        """Return the names of all samples of a step, of all processes."""
        names = []
        first = step * micro_batches_per_step
        for number in range(first, first + micro_batches_per_step):
            for row in self.schedule.rows(number):
                names.append(self.dataset.name(row))
        return names
