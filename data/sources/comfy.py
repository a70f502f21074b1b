"""A dataset that ComfyUI encoded: latents and conditioning are taken as they are
(data/sources/comfy_shards.py)."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from torch import Tensor

from data.config import SourceConfig
from data.sources import comfy_shards
from data.sources.base import Entry, Source
from data.store.hashing import stamp_of
from models.base import ModelFamily


class ComfySource(Source):
    """A folder of ComfyUI's shards."""

    has_images = False

    def __init__(self, config: SourceConfig, family: ModelFamily):
        super().__init__(config)
        self.folder, self.family = Path(config.path), family
        self.places: list[tuple[str, int]] = []

    def entries(self, faults: list[str]) -> Iterator[Entry]:
        found, bad, warnings = comfy_shards.scan(self.folder, self.family)
        faults += bad
        for warning in warnings:
            print(f"note: {warning}")
        stamps = {file.name: stamp_of(file) for file in comfy_shards.shards(self.folder)}
        step = self.family.limits.latent_step
        for item in found:
            self.places.append((item.shard, item.index))
            size = (item.width * step, item.height * step)
            name = f"{item.shard} sample {item.index}"
            stamped = f"{stamps[item.shard]} {item.index}"
            yield Entry(
                len(self.places) - 1, name, [], stamped, self.config.repeats, 1.0, "", *size
            )

    def tensors(self, rows: Iterable[int]) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        if not self.places:
            for _ in self.entries([]):
                pass
        for shard, group in groupby(rows, key=lambda row: self.places[row][0]):
            wanted = {self.places[row][1]: row for row in group}
            for sample in comfy_shards.samples(self.folder, self.family, shard):
                if sample.index in wanted:
                    yield wanted[sample.index], sample.latents, sample.cond
