"""A dataset that ComfyUI encoded. Latents and conditioning are used unchanged (comfy_shards.py)."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path

from common.hashing import file_stamp
from data.config import SourceConfig
from data.samples import ListedSample
from data.sources.base import SampleTensors, Source
from data.sources.comfy_shards import FolderScan, read_samples, scan_folder, shard_paths
from models.base import ModelFamily


class ComfySource(Source):
    """A folder of ComfyUI's shards."""

    has_images = False

    def __init__(self, config: SourceConfig, family: ModelFamily):
        super().__init__(config)
        self.folder, self.family = Path(config.path), family

    @cached_property
    def scan(self) -> FolderScan:
        """Look at all samples of the folder. The entries of the scan are the rows of the source."""
        return scan_folder(self.folder, self.family)

    def samples(self) -> Iterator[ListedSample]:
        self.errors += self.scan.errors
        for warning in self.scan.warnings:
            print(f"note: {warning}")
        stamps = {}
        for path in shard_paths(self.folder):
            stamps[path.name] = file_stamp(path)
        cell_size = self.family.limits.latent_step
        for row, entry in enumerate(self.scan.entries):
            yield ListedSample(
                row=row,
                name=f"{entry.shard} sample {entry.index}",
                captions=[],
                stamp=f"{stamps[entry.shard]} {entry.index}",
                repeats=self.config.repeats,
                width=entry.width * cell_size,
                height=entry.height * cell_size,
            )

    def tensors(self, samples: Iterable[ListedSample]) -> Iterator[SampleTensors]:
        for shard, group in groupby(samples, key=self._shard_of):
            yield from self._shard_tensors(shard, list(group))

    def _shard_of(self, sample: ListedSample) -> str:
        return self.scan.entries[sample.row].shard

    def _shard_tensors(self, shard: str, samples: list[ListedSample]) -> Iterator[SampleTensors]:
        """Yield the tensors of samples from one shard, which is read once."""
        entries = self.scan.entries
        by_index = {}
        for sample in samples:
            index = entries[sample.row].index
            by_index[index] = sample
        stored_samples = read_samples(self.folder, self.family, shard)
        for stored in stored_samples:
            if stored.index not in by_index:
                continue
            sample = by_index[stored.index]
            yield SampleTensors(sample, stored.latents, stored.cond)
