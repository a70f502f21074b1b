"""Prompts that are encoded besides the captions: neutral prompts, and those of sliders."""

from dataclasses import dataclass
from typing import Any

from data.dataset import LatentDataset
from data.schedule import random_key
from objectives.config import PreserveConfig, SliderConfig

Conditioning = dict[str, Any]
NEUTRAL = "neutral"
TARGET = "target"
POSITIVE = "positive"
NEGATIVE = "negative"
EMPTY = "empty"


@dataclass(frozen=True)
class ExtraPrompts:
    """Prompts that a run encodes besides the captions of its samples."""

    texts: tuple[str, ...] = ()
    class_word: str = ""
    """Each caption is encoded with this word instead of the trigger, too. Empty: none is."""


def slider_texts(slider: SliderConfig) -> tuple[str, ...]:
    """Return all prompts of a slider."""
    if not slider.targets:
        return ()
    texts = slider.targets + slider.positives + slider.negatives
    if slider.uses_guidance:
        texts += ("",)
    return texts


def neutral_text(options: PreserveConfig, seed: int, first_visit: int) -> str:
    """Return the neutral prompt of a micro-batch, drawn by its first visit."""
    draw = random_key("neutral prompt", seed, first_visit)
    return options.prompts[draw % len(options.prompts)]


def slider_direction(options: SliderConfig, seed: int, first_visit: int) -> float:
    """Return the strength, 1 or -1, at which a micro-batch trains a slider."""
    draw = random_key("slider direction", seed, first_visit)
    return -1.0 if options.both_directions and draw % 2 else 1.0


def slider_prompts(options: SliderConfig, seed: int, first_visit: int) -> dict[str, str]:
    """Return the prompts of a micro-batch by their roles."""
    draw = random_key("slider target", seed, first_visit)
    drawn = options.prompts[draw % len(options.prompts)]
    prompts = {
        TARGET: drawn.target,
        POSITIVE: drawn.positive,
        NEGATIVE: drawn.negative,
    }
    if options.uses_guidance:
        prompts[EMPTY] = ""
    return prompts


def conditioning_of(
    dataset: LatentDataset, text: str, batch_size: int, cond: Conditioning
) -> Conditioning:
    """Return a batch's conditioning with one extra prompt instead of the captions."""
    row_ids = [dataset.extra_prompts[text]] * batch_size
    return {**cond, **dataset.text.read_batch(row_ids, dataset.variable_lengths)}
