"""The variants of an image's captions: with the trigger, and with shuffled or dropped tags.

All variants are known before training, so that each is encoded once: every possible variant, or
`max_variants` of them, drawn by a key of the caption.
"""

import math
import re
from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np

from data.config import CaptionConfig, SourceConfig
from data.schedule import random_key

Variants = dict[str, float]
"""Caption -> probability of drawing it; the probabilities sum to 1."""
TagOrder = tuple[str, ...]


def caption_variants(captions: list[str], source: SourceConfig) -> Variants:
    """Return all captions under which an image with these captions can be seen.

    The first one is the unchanged first caption. It is used wherever nothing is drawn, even if it
    is never drawn."""
    result: Variants = {with_trigger(captions[0], source): 0.0}
    for caption in captions:
        variants = variants_of_one(caption, source)
        for text, probability in variants.items():
            share = probability / len(captions)
            result[text] = result.get(text, 0.0) + share
    return result


def variants_of_one(caption: str, source: SourceConfig) -> Variants:
    """Return the variants of one caption."""
    options = source.captions
    if not (options.shuffle or options.tag_dropout):
        return {with_trigger(caption, source): 1.0}
    tags = split_tags(caption, options.separator)
    trigger = trigger_of(source)
    if trigger in tags:
        tags.remove(trigger)
    fixed_tags = tags[: options.keep_tokens]
    free_tags = tags[options.keep_tokens :]
    if number_of_orders(free_tags, options) <= options.max_variants:
        orders = all_orders(free_tags, options)
    else:
        orders = random_orders(free_tags, options)
    result: Variants = {}
    for order, probability in orders:
        joined = join_tags([*fixed_tags, *order], options.separator)
        text = with_trigger(joined, source)
        result[text] = result.get(text, 0.0) + probability
    return result


def trigger_of(source: SourceConfig) -> str:
    """Return the trigger of a source; regularization images have none."""
    return "" if source.regularization else source.captions.trigger.strip()


def with_trigger(caption: str, source: SourceConfig) -> str:
    """Return a caption with the source's trigger in front, unless it contains the trigger."""
    trigger = trigger_of(source)
    if not trigger or re.search(trigger_pattern(trigger), caption):
        return caption
    if not caption:
        return trigger
    return join_tags([trigger, caption], source.captions.separator)


def with_class(caption: str, source: SourceConfig, class_word: str) -> str:
    """Return a caption with a class instead of the source's trigger."""
    trigger = trigger_of(source)
    if not trigger:
        return caption
    return re.sub(trigger_pattern(trigger), lambda _: class_word, caption)


def trigger_pattern(trigger: str) -> str:
    """Return a regular expression for the trigger as whole words."""
    return rf"(?<!\w){re.escape(trigger)}(?!\w)"


def split_tags(caption: str, separator: str) -> list[str]:
    """Return the tags of a caption without surrounding spaces; empty tags are left out."""
    tags = [tag.strip() for tag in caption.split(separator)]
    return [tag for tag in tags if tag]


def join_tags(tags: list[str], separator: str) -> str:
    """Join tags with the separator; a visible separator is followed by a space."""
    visible = separator.strip()
    return f"{visible} ".join(tags) if visible else separator.join(tags)


def kept_counts(num_tags: int, options: CaptionConfig) -> range:
    """Return the numbers of tags that can be left after tags were dropped."""
    if options.tag_dropout:
        return range(num_tags + 1)
    return range(num_tags, num_tags + 1)


def number_of_orders(tags: list[str], options: CaptionConfig) -> int:
    """Count the orders of all subsets of tags that `all_orders` yields."""
    num_tags = len(tags)
    count_orders = math.perm if options.shuffle else math.comb
    total = 0
    for size in kept_counts(num_tags, options):
        total += count_orders(num_tags, size)
    return total


def all_orders(tags: list[str], options: CaptionConfig) -> Iterator[tuple[TagOrder, float]]:
    """Yield every order of every subset of tags, with its probability."""
    num_tags = len(tags)
    dropout = options.tag_dropout
    for size in kept_counts(num_tags, options):
        drop_probability = dropout ** (num_tags - size)
        keep_probability = (1 - dropout) ** size
        probability = drop_probability * keep_probability
        for subset in combinations(tags, size):
            orders = [subset]
            if options.shuffle:
                orders = list(permutations(subset))
            for order in orders:
                yield order, probability / len(orders)


def random_orders(tags: list[str], options: CaptionConfig) -> Iterator[tuple[TagOrder, float]]:
    """Yield `max_variants` random orders of random subsets, always the same for the same tags."""
    generator = np.random.Philox(key=random_key("caption", *tags))
    random = np.random.Generator(generator)
    for _ in range(options.max_variants):
        is_kept = random.random(len(tags)) >= options.tag_dropout
        order = np.arange(len(tags))
        if options.shuffle:
            order = np.argsort(random.random(len(tags)))
        kept_order = order[is_kept[order]]
        kept_tags = tuple(tags[index] for index in kept_order)
        yield kept_tags, 1 / options.max_variants
