"""The files of a finished run: the adapter with its metadata, and the base model with the adapter merged."""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from data.batches import LatentDataset
from data.identity import files_identity
from lora_algos import formats
from lora_algos.base import Adapted
from models.base import ModelFamily
from training.config import TrainConfig, to_yaml
from training.files import new_folder, write_file

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LIBRARIES = ("torch", "accelerate", "diffusers", "peft", "transformers", "datasets", "safetensors")
TOTAL_STEPS = "train_lora.total_steps"


@dataclass(frozen=True)
class Provenance:
    """Facts about a run that its config does not hold."""

    total_steps: int
    total_batch_size: int
    started_at: float


def write_adapter(
    config: TrainConfig, family: ModelFamily, adapted: Adapted, dataset: LatentDataset, provenance: Provenance
) -> Path:
    """Writes output_dir/<name>.safetensors."""
    path = Path(config.output_dir) / f"{config.export.name}.safetensors"
    tensors = formats.to_file(adapted, DTYPES[config.lora_dtype])
    ss = ss_metadata(config, family, adapted, dataset, provenance)
    hashes = addnet_hashes(formats.to_bytes(tensors, ss))
    write_file(path, formats.to_bytes(tensors, {**ss, **hashes, **own_metadata(config, family, dataset, provenance)}))
    return path


def ss_metadata(
    config: TrainConfig, family: ModelFamily, adapted: Adapted, dataset: LatentDataset, provenance: Provenance
) -> dict[str, str]:
    """kohya's keys, from which ComfyUI, A1111 and Forge show what a file is and was trained on, and modelspec's."""
    specs = list(adapted.specs().values())
    folder = Path(config.data.images or "").name
    tags: dict[str, int] = {}
    for caption in dataset.captions:
        for tag in filter(None, (part.strip() for part in caption.split(","))):
            tags[tag] = tags.get(tag, 0) + 1
    side, name = config.data.resolution, config.export.name
    model_name = Path(config.model.path or "").name
    values: dict[str, object] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": max(spec.rank for spec in specs),
        "ss_network_alpha": specs[0].alpha,
        "ss_network_args": "{}",
        "ss_output_name": name,
        "ss_sd_model_name": model_name,
        "ss_clip_skip": "None",
        "ss_steps": provenance.total_steps,
        "ss_seed": config.seed,
        "ss_learning_rate": config.learning_rate,
        "ss_optimizer": config.optimizer,
        "ss_lr_scheduler": config.optim.lr_schedule,
        "ss_mixed_precision": "bf16" if config.training_dtype == "bf16" else "no",
        "ss_batch_size_per_device": config.batch_size,
        "ss_total_batch_size": provenance.total_batch_size,
        "ss_gradient_accumulation_steps": config.grad_accumulation_steps,
        "ss_gradient_checkpointing": config.gradient_checkpointing,
        "ss_num_train_images": len(dataset.epoch_rows),
        "ss_resolution": f"({side}, {side})",
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1, "img_count": len(dataset)}}),
        "ss_tag_frequency": json.dumps({folder: tags}),
        "ss_bucket_info": json.dumps({"buckets": {"0": {"resolution": [side, side], "count": len(dataset)}}}),
        "ss_training_started_at": provenance.started_at,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.date": datetime.fromtimestamp(provenance.started_at, UTC).isoformat(timespec="seconds"),
    }
    return {**{key: str(value) for key, value in values.items()}, **family.file_metadata(adapted.model)}


def own_metadata(
    config: TrainConfig, family: ModelFamily, dataset: LatentDataset, provenance: Provenance
) -> dict[str, str]:
    """What is needed to repeat the run, or to continue it."""
    return {
        TOTAL_STEPS: str(provenance.total_steps),
        "train_lora.config": to_yaml(config),
        "train_lora.base_model_hash": files_identity(family.component_files("denoiser"), Path(config.data.cache_dir)),
        "train_lora.dataset_hash": dataset.fingerprint,
        "train_lora.versions": json.dumps({name: version(name) for name in LIBRARIES}),
    }


def addnet_hashes(content: bytes) -> dict[str, str]:
    """The hashes by which A1111 and Forge know a file: they do not depend on the metadata (sd-scripts, train_util)."""
    tensors_at = 8 + int.from_bytes(content[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(content[tensors_at:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def total_steps_of(metadata: dict[str, str]) -> int:
    """Steps that a file of ours was trained for; 0 for another's."""
    return int(metadata.get(TOTAL_STEPS, metadata.get("ss_steps", "0")))


def write_merged(config: TrainConfig, family: ModelFamily, adapted: Adapted) -> Path:
    """Writes output_dir/model_with_lora: the whole pipeline, its denoiser in the dtype the base is stored in."""
    path = Path(config.output_dir) / "model_with_lora"
    merged: nn.Module = family.load_denoiser(torch.float32)
    adapted.merge_into(merged)
    pipeline = family.pipeline(merged.to(family.stored_dtype()))
    with new_folder(path) as beside:
        pipeline.save_pretrained(beside)
    return path
