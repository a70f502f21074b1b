"""Counts over the captions of a plan, and captions that probably are mistakes."""

from hashlib import blake2b

import numpy as np

from common.text import one_line
from data.config import SourceConfig
from data.media.captions import trigger_of, with_trigger
from data.plan_samples import Sample
from models.base import ModelFamily
from tools.data.counts import NameList, ValueRange

TOKENIZED_TOGETHER = 1000
MAX_CAPTION_LENGTH = 60
HASH_BYTES = 8


class CaptionSurvey:
    """Counts of captions. Tokens are counted with the trigger that the run adds."""

    def __init__(self, family: ModelFamily, trigger_words: str):
        """`trigger_words`: those of export.trigger_words."""
        self.family, self.trigger_words = family, trigger_words
        self.hashes = bytearray()
        self.tokens = ValueRange()
        self.max_tokens = 0
        """Tokens that the text encoder reads."""
        self.too_long = NameList()
        self.empty = NameList()
        self.without_trigger: dict[str, NameList] = {}
        """Trigger -> captions to which the run adds it."""
        self.without_trigger_words = NameList()
        """Captions that are trained without the trigger words that the adapter's file names."""
        self._names_of_caption: dict[str, list[str]] = {}

    @property
    def num_different(self) -> int:
        """Return the number of different captions."""
        return len(np.unique(np.frombuffer(self.hashes, "<u8")))

    def add(self, sample: Sample, name: str, source: SourceConfig) -> None:
        """Add the captions of a sample. `source`: its options."""
        for caption in sample.listed.captions:
            digest = blake2b(caption.encode(), digest_size=HASH_BYTES)
            self.hashes += digest.digest()
            trained_caption = with_trigger(caption, source)
            if not caption.strip():
                self.empty.add(name)
            if trained_caption != caption and not sample.planned.is_held_out:
                trigger = trigger_of(source)
                captions = self.without_trigger.setdefault(trigger, NameList())
                captions.add(named_caption(name, caption))
            if self._lacks_trigger_words(trained_caption, source):
                self.without_trigger_words.add(named_caption(name, trained_caption))
            names = self._names_of_caption.setdefault(trained_caption, [])
            names.append(name)
        if len(self._names_of_caption) >= TOKENIZED_TOGETHER:
            self.count_tokens()

    def _lacks_trigger_words(self, trained_caption: str, source: SourceConfig) -> bool:
        """Return whether a caption should contain the trigger words, and does not.

        Regularization images are trained without them."""
        if source.regularization or not self.trigger_words:
            return False
        return self.trigger_words not in trained_caption

    def count_tokens(self) -> None:
        """Count the tokens of the captions that were added since the last call."""
        captions = list(self._names_of_caption)
        if not captions:
            return
        counts, self.max_tokens = self.family.count_tokens(captions)
        for caption, count in zip(captions, counts, strict=True):
            self.tokens.add(count)
            if count > self.max_tokens:
                self._add_too_long(caption, count)
        self._names_of_caption = {}

    def _add_too_long(self, caption: str, num_tokens: int) -> None:
        """Add a caption that the text encoder cuts."""
        names = self._names_of_caption[caption]
        label = names[0]
        num_unnamed = len(names) - 1
        if num_unnamed:
            label += f" and {num_unnamed} more"
        text = one_line(caption, MAX_CAPTION_LENGTH)
        line = f"{label}  {num_tokens} tokens: {text}"
        self.too_long.add(line, times=len(names))


def named_caption(name: str, caption: str) -> str:
    """Return a line for a caption and the sample that has it."""
    text = one_line(caption, MAX_CAPTION_LENGTH)
    return f"{name}  {text}"
