"""Blank images with a caption, for training that needs prompts but no images."""

import io
from collections.abc import Iterable, Iterator

from PIL import Image

from data.config import DataConfig, SourceConfig
from data.samples import ListedSample
from data.sources.base import SampleContent, Source

GRAY = (128, 128, 128)


class BlankSource(Source):
    """One gray image of data.resolution, with the caption of the source."""

    def __init__(self, config: SourceConfig, data: DataConfig):
        super().__init__(config)
        self.side = data.resolution

    def samples(self) -> Iterator[ListedSample]:
        yield ListedSample(
            row=0,
            name="no image",
            captions=[self.config.captions.text or ""],
            stamp=f"blank {self.side}",
        )

    def contents(self, samples: Iterable[ListedSample]) -> Iterator[SampleContent]:
        file = io.BytesIO()
        image = Image.new("RGB", (self.side, self.side), GRAY)
        image.save(file, "PNG")
        for sample in samples:
            yield SampleContent(sample, file.getvalue())
