"""What an adapter file says about itself, for ComfyUI, A1111, Forge and the trainer that goes on from it."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from adapter_files import files
from adapter_files.kohya_metadata import network_metadata
from data.dataset import LatentDataset
from data.precompute.build import Datasets
from data.store.hashing import files_identity
from lora_algos.attach import Adapted
from models.base import ModelFamily
from training.config import TrainConfig, to_yaml
from training.optim.registry import OPTIMIZERS

LIBRARIES = ("torch", "accelerate", "diffusers", "peft", "transformers", "datasets", "safetensors")
TOTAL_STEPS = "train_lora.total_steps"


@dataclass
class Parts:
    """What a run is made of, before Accelerate prepares it."""

    family: ModelFamily
    datasets: Datasets
    adapted: Adapted
    names: files.Names
    """How adapter files name the layers."""
    previous_steps: int
    """Steps that the existing LoRA had been trained for."""


@dataclass(frozen=True)
class Provenance:
    """Facts about a run that its config does not hold."""

    total_steps: int
    total_batch_size: int
    started_at: float
    weights: str
    """Which of the run's weights these are, in words."""


def file_metadata(config: TrainConfig, parts: Parts, layers: files.Layers, provenance: Provenance) -> dict[str, str]:
    """All metadata of an adapter file but its hashes."""
    return {
        **network_metadata(layers),
        **ss_metadata(config, parts.datasets.train, provenance),
        **parts.family.file_metadata(parts.adapted.model),
        **own_metadata(config, parts.family, parts.datasets.train, provenance),
    }


def bucket_info(dataset: LatentDataset) -> list[dict[str, object]]:
    sizes = [dataset.size(bucket[0].first) for bucket in dataset.buckets]
    counts = [sum(segment.visits for segment in bucket) for bucket in dataset.buckets]
    return [{"resolution": [w, h], "count": count} for (h, w), count in zip(sizes, counts, strict=True)]


def ss_metadata(config: TrainConfig, dataset: LatentDataset, provenance: Provenance) -> dict[str, str]:
    """kohya's keys, from which ComfyUI, A1111 and Forge show what a file was trained on, and modelspec's."""
    folder = Path(next(iter(config.data.all_sources())).path).name
    tags: dict[str, int] = {}
    for caption in dataset.first_captions():
        for tag in filter(None, (part.strip() for part in caption.split(","))):
            tags[tag] = tags.get(tag, 0) + 1
    side, name = config.data.resolution, config.export.name
    model_name = Path(config.model.path or "").name
    values: dict[str, object] = {
        "ss_output_name": name,
        "ss_sd_model_name": model_name,
        "ss_clip_skip": "None",
        "ss_steps": provenance.total_steps,
        "ss_seed": config.seed,
        "ss_learning_rate": config.learning_rate,
        "ss_optimizer": config.optimizer_name,
        "ss_lr_scheduler": config.optim.lr_schedule,
        "ss_mixed_precision": "bf16" if config.training_dtype == "bf16" else "no",
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": provenance.total_batch_size,
        "ss_gradient_accumulation_steps": config.grad_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_num_train_images": dataset.epoch_size,
        "ss_resolution": f"({side}, {side})",
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1, "img_count": len(dataset)}}),
        "ss_tag_frequency": json.dumps({folder: tags}),
        "ss_bucket_info": json.dumps({"buckets": dict(enumerate(bucket_info(dataset)))}),
        "ss_training_started_at": provenance.started_at,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.fromtimestamp(provenance.started_at, UTC).isoformat(timespec="seconds"),
    }
    if config.export.trigger is not None:
        values |= {"modelspec.trigger_phrase": config.export.trigger, "ss_training_comment": config.export.trigger}
    return {key: str(value) for key, value in values.items()}


def own_metadata(
    config: TrainConfig, family: ModelFamily, dataset: LatentDataset, provenance: Provenance
) -> dict[str, str]:
    """What is needed to repeat the run, or to continue it."""
    return {
        TOTAL_STEPS: str(provenance.total_steps),
        "train_lora.weights": provenance.weights,
        "train_lora.config": to_yaml(config),
        "train_lora.base_model_hash": files_identity(family.component_files("denoiser"), Path(config.data.cache_dir)),
        "train_lora.dataset_hash": dataset.fingerprint,
        "train_lora.versions": json.dumps({name: version(name) for name in libraries(config)}),
    }


def libraries(config: TrainConfig) -> list[str]:
    """The packages that a run's result depends on."""
    return list(dict.fromkeys([*LIBRARIES, OPTIMIZERS[config.optimizer_name].package]))


def total_steps_of(path: str, metadata: dict[str, str]) -> int:
    """Steps that a file was trained for: from its metadata, or a name such as ComfyUI gives (`_500_steps_`), else 0."""
    for name in (TOTAL_STEPS, "ss_steps"):
        if metadata.get(name, "").isdigit():
            return int(metadata[name])
    found = re.search(r"(?:^|_)(\d+)_steps(?:_|\.|$)", Path(path).name)
    return int(found[1]) if found else 0
