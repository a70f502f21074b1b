"""Metadata of adapter files, for ComfyUI, A1111, Forge, and for repeating or continuing the run."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from adapter_files.kohya_metadata import TOTAL_STEPS, network_metadata
from common.hashing import hash_of_files
from data.config import DataConfig
from data.dataset import LatentDataset
from lora_algos.traits import Layers
from training.components import RunComponents
from training.config import public_yaml, to_yaml
from training.optim.registry import OPTIMIZERS

LIBRARIES = ("torch", "accelerate", "diffusers", "peft", "transformers", "datasets", "safetensors")
STEPS_IN_NAME = re.compile(r"(?:^|_)(\d+)_steps(?:_|\.|$)")
"""Steps in a file name, as ComfyUI writes them: `_500_steps_`."""


@dataclass(frozen=True)
class ExportFacts:
    """Facts about exported weights that the config does not contain."""

    name: str
    """File name without format and extension."""
    total_steps: int
    total_batch_size: int
    started_at: float
    weights: str
    """Description of the weights, such as "after step 400"."""


def file_metadata(components: RunComponents, layers: Layers, facts: ExportFacts) -> dict[str, str]:
    """Return all metadata of an adapter file except its hashes."""
    needed = {
        **network_metadata(layers),
        **components.family.file_metadata(components.adapted.model),
        TOTAL_STEPS: str(facts.total_steps),
    }
    if components.config.export.metadata == "none":
        return needed
    return {
        **needed,
        **kohya_metadata(components, facts),
        **trainer_metadata(components, facts),
    }


def bucket_info(dataset: LatentDataset) -> list[dict[str, object]]:
    """Return resolution and number of samples of each bucket, in kohya's form."""
    entries: list[dict[str, object]] = []
    for bucket in dataset.buckets:
        first_row = bucket[0].first
        height, width = dataset.size(first_row)
        visits = [segment.visits for segment in bucket]
        entry = {
            "resolution": [width, height],
            "count": sum(visits),
        }
        entries.append(entry)
    return entries


def tag_counts(dataset: LatentDataset) -> dict[str, int]:
    """Count the comma-separated tags of all captions."""
    counts: Counter[str] = Counter()
    for caption in dataset.first_captions():
        for padded_tag in caption.split(","):
            tag = padded_tag.strip()
            if tag:
                counts[tag] += 1
    return dict(counts)


def data_metadata(data: DataConfig, dataset: LatentDataset) -> dict[str, object]:
    """Return kohya's keys about the training images."""
    first_source = next(iter(data.all_sources()))
    folder = Path(first_source.path).name
    image_counts = {"n_repeats": 1, "img_count": len(dataset)}
    buckets = dict(enumerate(bucket_info(dataset)))
    return {
        "ss_num_train_images": dataset.epoch_size,
        "ss_dataset_dirs": json.dumps({folder: image_counts}),
        "ss_tag_frequency": json.dumps({folder: tag_counts(dataset)}),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
    }


def kohya_metadata(components: RunComponents, facts: ExportFacts) -> dict[str, str]:
    """Return kohya's keys and those of modelspec, from which programs show what a file was trained
    on."""
    config, dataset = components.config, components.datasets.train
    side = config.data.resolution
    started_at = datetime.fromtimestamp(facts.started_at, UTC)
    values: dict[str, object] = {
        "ss_output_name": facts.name,
        "ss_sd_model_name": Path(config.model.path or "").name,
        "ss_clip_skip": "None",
        "ss_steps": facts.total_steps,
        "ss_seed": config.seed,
        "ss_learning_rate": config.learning_rate,
        "ss_optimizer": config.optimizer,
        "ss_lr_scheduler": config.optim.lr_scheduler,
        "ss_mixed_precision": "bf16" if config.training_dtype == "bf16" else "no",
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": facts.total_batch_size,
        "ss_gradient_accumulation_steps": config.grad_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_resolution": f"({side}, {side})",
        "ss_training_started_at": facts.started_at,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": facts.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": started_at.isoformat(timespec="seconds"),
    }
    if not config.objective.slider.needs_no_images:
        values |= data_metadata(config.data, dataset)
    trigger_words = config.export.trigger_words
    if trigger_words is not None:
        values |= {"modelspec.trigger_phrase": trigger_words, "ss_training_comment": trigger_words}
    return {key: str(value) for key, value in values.items()}


def trainer_metadata(components: RunComponents, facts: ExportFacts) -> dict[str, str]:
    """Return what is needed to repeat the run or to continue the adapter."""
    config = components.config
    base_files = components.family.identity_files("denoiser")
    packages = dict.fromkeys([*LIBRARIES, OPTIMIZERS[config.optimizer].package])
    versions = {name: version(name) for name in packages}
    cache_dir = Path(config.data.cache_dir)
    text = public_yaml(config)
    if config.export.metadata == "full":
        text = to_yaml(config)
    return {
        "train_lora.weights": facts.weights,
        "train_lora.config": text,
        "train_lora.base_model_hash": hash_of_files(base_files, cache_dir),
        "train_lora.dataset_hash": components.datasets.train.content_hash,
        "train_lora.versions": json.dumps(versions),
    }


def total_steps_of(path: str, metadata: dict[str, str]) -> int:
    """Return for how many steps a file was trained, by its metadata or its name; 0 if neither says
    so."""
    for key in (TOTAL_STEPS, "ss_steps"):
        value = metadata.get(key, "")
        if value.isdigit():
            return int(value)
    file_name = Path(path).name
    match = STEPS_IN_NAME.search(file_name)
    if match is None:
        return 0
    return int(match[1])
