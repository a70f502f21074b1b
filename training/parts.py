"""The parts of a run that exist before Accelerate prepares them."""

from dataclasses import dataclass

from adapter_files.layer_names import LayerNames
from data.precompute.build import Datasets
from lora_algos.adapted_model import AdaptedModel
from models.base import ModelFamily


@dataclass
class RunParts:
    """The data, the model with its adapters, and how files name its layers."""

    family: ModelFamily
    datasets: Datasets
    adapted: AdaptedModel
    names: LayerNames
    previous_steps: int
    """Steps for which the existing LoRA was trained."""
