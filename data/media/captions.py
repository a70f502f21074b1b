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
from data.schedule import key

Variants = dict[str, float]
"""Caption -> probability of drawing it; the probabilities sum to 1."""
TagOrder = tuple[str, ...]


def caption_variants(captions: list[str], source: SourceConfig) -> Variants:
    """Return all captions under which an image with these captions can be seen.

    The first one is the unchanged first caption. It is used wherever nothing is drawn, even if it
    is never drawn."""
    result: Variants = {with_trigger(captions[0], source): 0.0}
    for caption in captions:
        for text, probability in variants_of_one(caption, source).items():
            result[text] = result.get(text, 0.0) + probability / len(captions)
    return result


def variants_of_one(caption: str, source: SourceConfig) -> Variants:
    """Return the variants of one caption."""
    options = source.captions
    if not (options.shuffle or options.tag_dropout):
        return {with_trigger(caption, source): 1.0}
    tags = [tag.strip() for tag in caption.split(options.separator) if tag.strip()]
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
        text = with_trigger(join_tags([*fixed_tags, *order], options.separator), source)
        result[text] = result.get(text, 0.0) + probability
    return result


def trigger_of(source: SourceConfig) -> str:
    """Return the trigger of a source; regularization images have none."""
    return "" if source.regularization else source.captions.trigger.strip()


def with_trigger(caption: str, source: SourceConfig) -> str:
    """Return a caption with the source's trigger in front, unless it contains the trigger."""
    trigger = trigger_of(source)
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return join_tags([trigger, caption], source.captions.separator) if caption else trigger


def join_tags(tags: list[str], separator: str) -> str:
    """Join tags with the separator; a visible separator is followed by a space."""
    visible = separator.strip()
    return f"{visible} ".join(tags) if visible else separator.join(tags)


def number_of_orders(tags: list[str], options: CaptionConfig) -> int:
    """Count the orders of all subsets of tags that `all_orders` yields."""
    count = len(tags)
    sizes = range(count + 1) if options.tag_dropout else (count,)
    if options.shuffle:
        return sum(math.perm(count, size) for size in sizes)
    return sum(math.comb(count, size) for size in sizes)


def all_orders(tags: list[str], options: CaptionConfig) -> Iterator[tuple[TagOrder, float]]:
    """Yield every order of every subset of tags, with its probability."""
    count, dropout = len(tags), options.tag_dropout
    for size in range(count + 1) if dropout else (count,):
        probability = dropout ** (count - size) * (1 - dropout) ** size
        for subset in combinations(tags, size):
            orders = list(permutations(subset)) if options.shuffle else [subset]
            yield from ((order, probability / len(orders)) for order in orders)


def random_orders(tags: list[str], options: CaptionConfig) -> Iterator[tuple[TagOrder, float]]:
    """Yield `max_variants` random orders of random subsets, always the same ones for the same tags."""
    random = np.random.Generator(np.random.Philox(key=key("caption", *tags)))
    for _ in range(options.max_variants):
        is_kept = random.random(len(tags)) >= options.tag_dropout
        order = np.arange(len(tags))
        if options.shuffle:
            order = np.argsort(random.random(len(tags)))
        yield tuple(tags[i] for i in order if is_kept[i]), 1 / options.max_variants
