"""The captions that the stores lack, encoded by the text encoders."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.announce import announced
from common.errors import DataError, bullet_list, counted
from data.config import DataConfig
from data.precompute.controls import ContentHashes, control_pictures
from data.precompute.encode import OTHER_MACHINE, EncodeJob, changed_message
from data.precompute.plan import MissingCaption, first_occurrences
from data.precompute.run_sources import ListedContent
from data.precompute.streams import batched
from data.store.keys import key_of
from data.store.store import Store
from data.store.tables import Table
from models.config import ModelConfig
from models.encoder_placement import place_text_encoders, release_text_encoders

MAX_LONG_CAPTIONS, MAX_LONG_CAPTION_LETTERS = 20, 100
"""Captions that are cut by the text encoder and named in a note, and letters of each."""


def caption_advice(config: DataConfig, model: ModelConfig) -> list[str]:
    """Return options with which captions take less memory."""
    size = config.encode_batch_size
    advice = []
    if size > 1:
        advice.append(f"--data.encode_batch_size {size // 2} (now {size})")
    if model.text_encoder_placement == "device":
        advice.append("--model.text_encoder_placement layers")
    return [*advice, OTHER_MACHINE]


@dataclass
class LongCaptions:
    """Captions that are longer than the text encoder reads: their number, and the first of them."""

    count: int = 0
    texts: list[str] = field(default_factory=list)

    def add(self, texts: list[str], num_tokens: list[int], max_tokens: int) -> None:
        """Add the captions that have too many tokens."""
        for text, count in zip(texts, num_tokens, strict=True):
            if count <= max_tokens:
                continue
            self.count += 1
            if len(self.texts) == MAX_LONG_CAPTIONS:
                continue
            shortened = text[:MAX_LONG_CAPTION_LETTERS]
            self.texts.append(shortened)


def long_captions_note(reports: list[dict[str, Any]], max_lines: int) -> str | None:
    """Return a note about captions that are cut; None without such captions.

    `reports`: the fields of LongCaptions from each process."""
    count = sum(report["count"] for report in reports)
    if not count:
        return None
    texts: dict[str, None] = {}
    for report in reports:
        texts |= dict.fromkeys(report["texts"])
    verb = "is" if count == 1 else "are"
    heading = (
        f"{counted(count, 'caption')} {verb} longer than the text encoder reads, and "
        f"{verb} cut off at the end"
    )
    return bullet_list(heading, list(texts), max_lines)


@torch.no_grad()
def encode_captions(job: EncodeJob, store: Store, missing: Table[MissingCaption]) -> LongCaptions:
    """Encode this process's share of the missing captions; return the captions that are cut."""
    long_captions = LongCaptions()
    family = job.family
    different = first_occurrences(missing.keys("key"))
    share = job.own_share(different)
    if not len(share):
        return long_captions
    placement = family.config.text_encoder_placement
    with announced("loading the text encoders"):
        encoders = place_text_encoders(family.load_encoders("text"), placement, job.device)
    captions = job.progress(missing.rows(share), len(share), "captions")
    encode: Callable[..., list[dict[str, Tensor]]] = partial(encode_texts, job)
    if family.controls.is_seen_by_text_encoder:
        encode = CaptionsWithImages(job).encode
    with store.writer() as writer:
        for batch in batched(captions, job.config.encode_batch_size):
            batch_captions = [caption for _, caption in batch]
            texts = [caption.text for caption in batch_captions]
            num_tokens, max_tokens = family.count_tokens(texts)
            long_captions.add(texts, num_tokens, max_tokens)
            conds = encode(encoders, batch_captions)
            for caption, cond in zip(batch_captions, conds, strict=True):
                writer.add(caption.key, cond)
    release_text_encoders(encoders)
    return long_captions


class CaptionsWithImages:
    """Encodes captions together with the control images of their samples.

    Each caption is encoded alone, because its images have their own sizes. Captions come in the order of
    the samples, and the captions of one sample follow each other, so each file is read once."""

    def __init__(self, job: EncodeJob):
        self.job = job
        self.file: ListedContent | None = None
        """The file that was read last."""

    def encode(self, encoders: Any, captions: list[MissingCaption]) -> list[dict[str, Tensor]]:
        """Return the conditioning of each caption. Raises DataError if an image has changed."""
        job = self.job
        conds = []
        for caption in captions:
            file = self._read(caption.listed)
            self._check(file, caption)
            pictures = control_pictures(file.controls, job.config.background)
            cond = job.family.encode_with_controls(encoders, caption.text, pictures)
            conds.append(cond)
        return conds

    def _read(self, index: int) -> ListedContent:
        """Return the file of a listed sample."""
        file = self.file
        if file is not None and file.listed == index:
            return file
        indices = np.array([index])
        listed = self.job.listed.rows(indices)
        (file,) = self.job.planner.sources.contents(listed)
        self.file = file
        return file

    def _check(self, file: ListedContent, caption: MissingCaption) -> None:
        """Raise DataError if a file cannot be read any more, or differs from the plan."""
        if isinstance(file.content, DataError):
            raise DataError(f"{file.sample.name}: {file.content}")
        hashes = ContentHashes(
            content=key_of(file.content),
            mask=key_of(),
            controls=key_of(*file.controls),
        )
        keys = self.job.planner.controls
        key = keys.caption_key(caption.text, hashes)
        if key != caption.key:
            raise DataError(changed_message(file.sample.name))


def encode_texts(
    job: EncodeJob, encoders: Any, captions: list[MissingCaption]
) -> list[dict[str, Tensor]]:
    """Return the conditioning of each caption.

    The batch is filled up with empty prompts."""
    texts = [caption.text for caption in captions]
    num_texts = len(texts)
    num_padding = job.config.encode_batch_size - num_texts
    padding = [""] * num_padding
    padded_texts = texts + padding
    conds = job.family.encode_prompt(encoders, padded_texts)
    return conds[:num_texts]
