"""Facts about a run that its report shows, from the parts of the run."""

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from common.process import available_cores
from models.families.modular_family import ModularFamily
from training.components import RunComponents
from training.loss import LossFunction
from training.metadata import LIBRARIES, bucket_info
from training.report.data_pictures import DataPictures
from training.services import RunServices
from training.workflow.run_workflow import reads_diffusers_names

NOISE_BINS = 20
NUM_QUANTILES = 2000
"""Samples from which the distribution of noise levels is counted."""


def run_facts(
    components: RunComponents,
    loss_function: LossFunction,
    services: RunServices,
    summary: str,
    data: DataPictures,
) -> dict[str, Any]:
    """Return the facts, as values that JSON has."""
    datasets = components.datasets
    prompts = []
    if components.samples is not None:
        prompts = [asdict(prompt) for prompt in components.samples.prompts]
    num_trained = len(datasets.train)
    slider = components.config.objective.slider
    if slider.needs_no_images:
        num_trained = 0
    num_validation = 0
    if datasets.validation is not None:
        num_validation = len(datasets.validation)
    return {
        "summary": summary,
        "versions": library_versions(),
        "hardware": hardware(services),
        "planned_bytes": services.memory.planned,
        "buckets": bucket_info(datasets.train),
        "num_trained": num_trained,
        "num_held_out": num_validation,
        "dataset": datasets.train.content_hash,
        "noise_levels": noise_shares(components, loss_function),
        "prompts": prompts,
        "media": components.family.media,
        "has_control_images": components.datasets.train.num_controls(0) > 0,
        "trigger_words": components.config.export.trigger_words or "",
        "comfyui_reads_diffusers": reads_diffusers_names(components.family),
        "is_modular": isinstance(components.family, ModularFamily),
        "slider": [prompts._asdict() for prompts in slider.prompts],
        "pictures": data.pictures,
        "small_images": data.small_images,
    }


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a result."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        versions[name] = version(name)
    return versions


def hardware(services: RunServices) -> dict[str, str]:
    """Return what the run trains on, without the name of the computer."""
    process = services.process
    device = f"CPU, {available_cores()} cores"
    if process.device.type == "cuda":
        device = torch.cuda.get_device_name(process.device)
    return {
        "device": device,
        "processes": str(process.count),
        "system": platform.system(),
    }


def noise_shares(components: RunComponents, loss_function: LossFunction) -> list[float]:
    """Return the share of the training samples in each of NOISE_BINS equal ranges of the noise level.

    The level is sigma / (signal + sigma): 0 is clean, 1 is pure noise. The largest bucket counts."""
    dataset, objective = components.datasets.train, loss_function.objective
    largest = max(dataset.buckets, key=lambda bucket: sum(segment.visits for segment in bucket))
    shape = (1, *dataset.latent_shape(largest[0].first))
    num_tokens = components.family.limits.num_tokens(shape)
    quantile = (torch.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    t = objective.density(quantile)
    levels = objective.process.levels(t, num_tokens)
    counts = torch.histc(levels.flow_sigma.float(), NOISE_BINS, 0, 1)
    return (counts / counts.sum()).tolist()
