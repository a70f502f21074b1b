"""The captions that an image is shown with: what it is given, with trigger, shuffled and dropped tags.

Every variant is known before training, so that text is encoded once: all there are, or `max_variants` drawn by a key of
the caption.
"""

import math
import re
from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np

from data.config import SourceConfig
from data.schedule import key

Variants = dict[str, float]
"""Caption -> how often it is drawn, of a sum of 1."""


def variants(captions: list[str], source: SourceConfig, max_variants: int) -> Variants:
    """All that an image with these captions can be shown with."""
    # first the first caption as it is, which is shown wherever nothing is drawn
    result: Variants = {as_given(captions[0], source): 0.0}
    for caption in captions:
        for text, share in of_caption(caption, source, max_variants).items():
            result[text] = result.get(text, 0.0) + share / len(captions)
    return result


def of_caption(caption: str, source: SourceConfig, max_variants: int) -> Variants:
    """All that one caption can become."""
    if not (source.caption_shuffle or source.caption_tag_dropout):
        return {as_given(caption, source): 1.0}
    separator, trigger = source.caption_separator or ",", trigger_of(source)
    tags = [tag.strip() for tag in caption.split(separator) if tag.strip()]
    if trigger in tags:
        tags.remove(trigger)
    kept = tags[: source.caption_keep_tokens or 0]
    free = tags[len(kept) :]
    orders = all_orders if number_of_orders(free, source) <= max_variants else drawn_orders
    result: Variants = {}
    for order, share in orders(free, source, max_variants):
        text = as_given(joined([*kept, *order], separator), source)
        result[text] = result.get(text, 0.0) + share
    return result


def trigger_of(source: SourceConfig) -> str:
    return "" if source.regularisation else (source.caption_trigger or "").strip()


def as_given(caption: str, source: SourceConfig) -> str:
    """A caption with the source's trigger before it, unless it has that already."""
    trigger = trigger_of(source)
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return joined([trigger, caption], source.caption_separator or ",") if caption else trigger


def joined(tags: list[str], separator: str) -> str:
    return f"{separator.strip()} ".join(tags) if separator.strip() else separator.join(tags)


def number_of_orders(tags: list[str], source: SourceConfig) -> int:
    n = len(tags)
    sizes = range(n + 1) if source.caption_tag_dropout else (n,)
    return sum(math.comb(n, k) * (math.factorial(k) if source.caption_shuffle else 1) for k in sizes)


def all_orders(tags: list[str], source: SourceConfig, _: int) -> Iterator[tuple[tuple[str, ...], float]]:
    n, dropout = len(tags), source.caption_tag_dropout or 0.0
    for k in range(n + 1) if dropout else (n,):
        share = dropout ** (n - k) * (1 - dropout) ** k
        for chosen in combinations(tags, k):
            ways = list(permutations(chosen)) if source.caption_shuffle else [chosen]
            yield from ((way, share / len(ways)) for way in ways)


def drawn_orders(tags: list[str], source: SourceConfig, count: int) -> Iterator[tuple[tuple[str, ...], float]]:
    """`count` of them, always the same for the same tags."""
    bits = np.random.Generator(np.random.Philox(key=key("caption", *tags)))
    for _ in range(count):
        keep = bits.random(len(tags)) >= (source.caption_tag_dropout or 0.0)
        order = np.argsort(bits.random(len(tags))) if source.caption_shuffle else np.arange(len(tags))
        yield tuple(tags[i] for i in order if keep[i]), 1 / count
