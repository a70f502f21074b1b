"""The captions that the stores lack, encoded by the text encoders."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.announce import announced
from common.errors import DataError, bullet_list, counted
from data.config import DataConfig
from data.precompute.controls import control_pictures
from data.precompute.encode import OTHER_MACHINE, EncodeJob
from data.precompute.plan import MissingCaption, first_occurrences
from data.precompute.run_sources import ListedContent
from data.precompute.streams import batched
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
    with store.writer() as writer:
        for batch in batched(captions, batch_size(job)):
            batch_captions = [caption for _, caption in batch]
            texts = [caption.text for caption in batch_captions]
            num_tokens, max_tokens = family.count_tokens(texts)
            long_captions.add(texts, num_tokens, max_tokens)
            if family.controls.is_seen_by_text_encoder:
                conds = encode_texts_with_controls(job, encoders, batch_captions)
            else:
                conds = encode_texts(job, encoders, texts)
            for caption, cond in zip(batch_captions, conds, strict=True):
                writer.add(caption.key, cond)
    release_text_encoders(encoders)
    return long_captions


def encode_texts_with_controls(
    job: EncodeJob, encoders: Any, captions: list[MissingCaption]
) -> list[dict[str, Tensor]]:
    """Return the conditioning of each caption with the control images of its sample.

    Each caption is encoded alone, because its images have their own sizes."""
    sources, family = job.planner.sources, job.family
    indices = [caption.listed for caption in captions]
    listed = job.listed.rows(np.unique(indices))
    files: dict[int, ListedContent] = {}
    for file in sources.contents(listed):
        files[file.listed] = file
    conds = []
    for caption in captions:
        file = files[caption.listed]
        if isinstance(file.content, DataError):
            raise DataError(f"{file.sample.name}: {file.content}")
        pictures = control_pictures(file.controls, job.config.background)
        cond = family.encode_with_controls(encoders, caption.text, pictures)
        conds.append(cond)
    return conds


def batch_size(job: EncodeJob) -> int:
    """Return the number of captions that are taken at a time."""
    if job.family.controls.is_seen_by_text_encoder:
        return 1  # each is encoded alone
    return job.config.encode_batch_size


def encode_texts(job: EncodeJob, encoders: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """Return the conditioning of each text.

    The batch is filled up with empty prompts."""
    num_texts = len(texts)
    num_padding = job.config.encode_batch_size - num_texts
    padding = [""] * num_padding
    padded_texts = texts + padding
    conds = job.family.encode_prompt(encoders, padded_texts)
    return conds[:num_texts]
