"""The parts of a run that exist before Accelerate prepares them."""

from dataclasses import dataclass

from adapter_files.spellings import LayerSpellings
from data.precompute.build import Datasets
from lora_algos.adapted_model import AdaptedModel
from models.base import ModelFamily
from training.config import TrainConfig
from training.sampling.prepare import PreparedSamples


@dataclass
class RunComponents:
    """The config, the data, and the model with its adapters and the names of its layers in files."""

    config: TrainConfig
    family: ModelFamily
    datasets: Datasets
    adapted: AdaptedModel
    names: LayerSpellings
    previous_steps: int
    """Steps for which the existing LoRA was trained."""
    samples: PreparedSamples | None
    """The prompts of sample images; None if nothing is drawn."""
