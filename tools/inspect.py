"""`inspect`: what is in an adapter file, and with a model, what of it fits."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from adapter_files.keys import guess_model
from common.errors import AdapterError
from lora_algos.detection import algorithm_name, rank_of
from tools.adapter_file import AdapterFile, delta_of, needs_base
from tools.base_model import Model
from tools.options import Inspect
from tools.tables import Report
from tools.unknown_model import UnknownModel

# what is shown -> metadata that says it, the first that is there
FACTS = {
    "title": ("modelspec.title", "ss_output_name"),
    "base": ("ss_sd_model_name", "ss_base_model_version"),
    "base version": ("ss_base_model_version",),
    "architecture": ("modelspec.architecture",),
    "prediction": ("modelspec.prediction_type",),
    "made by": ("ss_network_module", "modelspec.implementation"),
    "rank, alpha": ("ss_network_dim",),
    "steps": ("train_lora.total_steps", "ss_steps"),
    "images": ("ss_num_train_images",),
    "learning rate": ("ss_learning_rate",),
    "optimizer": ("ss_optimizer",),
    "seed": ("ss_seed",),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "date": ("modelspec.date",),
    "trigger words": ("modelspec.trigger_phrase", "ss_trigger_words", "trigger"),
    "hash of tensors": ("sshs_model_hash",),
    "legacy hash": ("sshs_legacy_hash",),
    "hash of base": ("train_lora.base_model_hash", "ss_new_sd_model_hash"),
    "hash of data": ("train_lora.dataset_hash",),
    "extracted": ("train_lora.extracted",),
}
MOST_TAGS = 10


def run(options: Inspect) -> int:
    """Prints. Returns the exit code: 1 if something in the file does not fit, or is damaged."""
    model = Model(options.model_config(options.model)) if options.model else UnknownModel()
    adapter = AdapterFile(Path(options.file), model)
    dtypes = ", ".join(
        f"{str(dtype).removeprefix('torch.')} x {count}"
        for dtype, count in adapter.dtypes().items()
    )
    print(f"{options.file}: {len(adapter.store.infos)} tensors, {adapter.size:,} bytes, {dtypes}")
    print(
        f"looks like an adapter for {guess_model(adapter.store.infos) or 'a model that is not known here'}"
    )
    for name, value in facts(adapter.metadata).items():
        print(f"{name:16}{value}")
    report, damaged = surveyed(adapter)
    if report.total.layers:
        print(report)
    faults = adapter.unknown + damaged
    if options.model:
        known = sum(map(len, adapter.layers.values()))
        print(f"{known} of {len(adapter.store.infos)} keys belong to layers of {options.model}")
    for fault in faults:
        print(f"  {fault}")
    return 1 if faults else 0


def surveyed(adapter: AdapterFile) -> tuple[Report, list[str]]:
    """The layers by block, and a line for each that is damaged."""
    report, damaged = Report(with_error=False), []
    for layer in adapter.layers:
        try:
            tensors, weight = adapter.read(layer)
            algorithm = algorithm_name(tensors)
            norm = math.nan if needs_base(algorithm, weight) else size_of(delta_of(tensors, weight))
        except AdapterError as error:
            damaged.append(f"{layer}: {error}")
            continue
        alpha = float(tensors["alpha"]) if "alpha" in tensors else "-"
        report.add(
            layer,
            {"algorithm": algorithm, "rank": rank_of(tensors) or "-", "alpha": alpha},
            norm,
        )
    return report, damaged


def size_of(delta: Tensor) -> float:
    """AdapterError if it has none."""
    norm = float(delta.norm())
    if not math.isfinite(norm):
        raise AdapterError("its update is not finite (NaN or infinite values, or too large)")
    return norm


def facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """What the metadata says, under readable names."""
    found = {}
    for name, keys in FACTS.items():
        value = next(
            (metadata[key] for key in keys if metadata.get(key, "None") not in ("", "None")), None
        )
        if value is not None:
            found[name] = shortened(value)
    if "rank, alpha" in found:
        found["rank, alpha"] += f", {metadata.get('ss_network_alpha', '?')}"
    if tags := top_tags(metadata.get("ss_tag_frequency", "")):
        found["tags"] = tags
    shown = {key for keys in FACTS.values() for key in keys} | {
        "ss_network_alpha",
        "ss_tag_frequency",
    }
    others = sorted(metadata.keys() - shown)
    if others:
        found["other metadata"] = ", ".join(others)
    return found


def top_tags(text: str) -> str:
    """The most frequent tags of kohya's ss_tag_frequency: {folder: {tag: count}}."""
    try:
        counts: dict[str, int] = {}
        for folder in json.loads(text).values():
            for tag, count in folder.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, AttributeError, TypeError):
        return ""
    most = sorted(counts.items(), key=lambda item: -item[1])[:MOST_TAGS]
    return ", ".join(f"{tag} {count}" for tag, count in most)


def shortened(value: str, most: int = 100) -> str:
    line = " ".join(value.split())
    return line if len(line) <= most else line[: most - 3] + "..."
