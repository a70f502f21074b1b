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
        self.config, self.dataset, self.process = config, dataset, process
        self.schedule = Schedule(
            dataset.buckets, dataset.content_hash, config.seed, config.batch_size
        )
        self.timer = DataTimer()
        self.sample_log = None
        if config.tracking.log_samples:
            self.sample_log = SampleLog(Path(config.output_dir), process.index)
        options = config.adapter
        self.has_dropout = bool(options.dropout or options.rank_dropout or options.module_dropout)

    def from_step(self, step: int, micro_batches_per_step: int) -> Iterator[Batch]:
        """Yield this process's batches from `step`, counted from 0, to the last step."""
        first = step * micro_batches_per_step + self.process.index
        numbers = range(first, self.config.steps * micro_batches_per_step, self.process.count)
        source = MicroBatches(
            self.dataset, self.schedule, self.config.objective, micro_batches_per_step
        )
        pin_memory = self.process.device.type == "cuda"
        loader = load_micro_batches(source, numbers, self.config.data.num_workers, pin_memory)
        for number in numbers:
            with self.timer.measure():
                batch = next(loader)
            if self.sample_log is not None:
                step_number = number // micro_batches_per_step + 1
                self.sample_log.add(step_number, self.schedule.rows(number), batch)
            if self.has_dropout:
                torch.manual_seed(random_key("dropout", self.config.seed, number))
            yield batch.to(self.process.device)

    def sample_names(self, step: int, micro_batches_per_step: int) -> list[str]:
        """Return the names of all samples of a step, of all processes."""
        numbers = range(step * micro_batches_per_step, (step + 1) * micro_batches_per_step)
        return [self.dataset.name(row) for number in numbers for row in self.schedule.rows(number)]
