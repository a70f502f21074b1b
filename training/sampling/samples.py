"""Samples, and the weights with which they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from training.sampling.prompts import SamplePrompt

Weights = dict[str, Tensor]


class WeightSet(NamedTuple):
    """Weights of the adapter, and the factor on its update. None: that of each prompt."""

    weights: Weights
    strength: float | None = None


@dataclass(frozen=True)
class Samples:
    """Prompts, and for each label the images or videos (F, H, W, 3) in [0, 1] of these prompts."""

    prompts: list[SamplePrompt]
    images: dict[str, list[np.ndarray]]
    controls: Sequence[list[Image.Image]] = field(default_factory=list)
    """The images that the model was given with each prompt."""
