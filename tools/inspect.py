"""`inspect`: prints the content of an adapter file, and with a model, the keys that do not fit
it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from adapter_files.keys import guess_model
from common.dtypes import dtype_name
from common.errors import AdapterError
from common.text import one_line
from lora_algos.detection import algorithm_name, rank_of
from tools.adapter_file import AdapterFile, LayerData, delta_of, needs_base
from tools.base_model import BaseModel
from tools.options import InspectOptions
from tools.survival import survey
from tools.tables import NO_VALUE, BlockTable, list_facts
from tools.unknown_model import UnknownModel

FACT_KEYS = {
    "title": ("modelspec.title", "ss_output_name"),
    "base": ("ss_sd_model_name", "ss_base_model_version"),
    "base version": ("ss_base_model_version",),
    "architecture": ("modelspec.architecture",),
    "prediction": ("modelspec.prediction_type",),
    "network module": ("ss_network_module", "modelspec.implementation"),
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
"""Printed name -> keys of metadata. The first key that has a value is printed."""
ALPHA_KEY = "ss_network_alpha"
TAGS_KEY = "ss_tag_frequency"
MAX_TAGS = 10
MAX_VALUE_LENGTH = 100


def run(options: InspectOptions) -> int:
    """Print the content; return the exit code: 1 if something is damaged or does not fit."""
    model: BaseModel | UnknownModel = UnknownModel()
    path = options.model or options.against
    if path is not None:
        model = BaseModel(options.model_config(path))
    adapter = AdapterFile(Path(options.file), model)
    num_keys = len(adapter.store.infos)
    print(
        f"{options.file}: {num_keys} tensors, {adapter.num_bytes:,} bytes, {dtypes_text(adapter)}"
    )
    model_name = guess_model(adapter.store.infos) or "an unknown model"
    print(f"looks like an adapter for {model_name}")
    for line in list_facts(metadata_facts(adapter.metadata)):
        print(line)
    table, layer_errors = survey_layers(adapter)
    if table.total.num_layers:
        print(table)
    if path is not None:
        num_fitting = sum(len(keys) for keys in adapter.layers.values())
        print(f"{num_fitting} of {num_keys} keys belong to layers of {path}")
    if options.against is not None and not layer_errors:
        print(f"merged into {options.against}:")
        print(survey(adapter, BaseModel(options.model_config(options.against))))
    errors = adapter.key_errors + layer_errors
    for error in errors:
        print(f"  {error}")
    return 1 if errors else 0


def dtypes_text(adapter: AdapterFile) -> str:
    """Return the dtypes of an adapter with their numbers of tensors, such as `float32 x 20`."""
    texts = []
    for dtype, count in adapter.dtype_counts().items():
        texts.append(f"{dtype_name(dtype)} x {count}")
    return ", ".join(texts)


def survey_layers(adapter: AdapterFile) -> tuple[BlockTable, list[str]]:
    """Return the table of all layers, and a line for each damaged layer."""
    table = BlockTable(has_errors=False)
    errors = []
    for layer in adapter.layers:
        try:
            data = adapter.read(layer)
            norm = update_norm(data)
        except AdapterError as error:
            errors.append(f"{layer}: {error}")
            continue
        table.add(layer, layer_attributes(data), norm)
    return table, errors


def update_norm(data: LayerData) -> float:
    """Return the norm of a layer's update; NaN if it depends on an unknown base weight.

    Raises AdapterError if the update is not finite."""
    if needs_base(data.tensors, data.weight):
        return math.nan
    return finite_norm(delta_of(data.tensors, data.weight))


def finite_norm(delta: Tensor) -> float:
    """Return the norm of an update. Raises AdapterError if it is not finite."""
    norm = float(delta.norm())
    if not math.isfinite(norm):
        raise AdapterError("its update is not finite (NaN or infinite values, or too large)")
    return norm


def layer_attributes(data: LayerData) -> dict[str, object]:
    """Return algorithm, rank and alpha of a layer."""
    tensors = data.tensors
    alpha: float | str = NO_VALUE
    if "alpha" in tensors:
        alpha = float(tensors["alpha"])
    return {
        "algorithm": algorithm_name(tensors),
        "rank": rank_of(tensors) or NO_VALUE,
        "alpha": alpha,
    }


def metadata_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata under readable names."""
    facts = {}
    shown_keys = {ALPHA_KEY, TAGS_KEY}
    for name, keys in FACT_KEYS.items():
        shown_keys.update(keys)
        value = first_value(metadata, keys)
        if value is not None:
            facts[name] = one_line(value, MAX_VALUE_LENGTH)
    if "rank, alpha" in facts:
        alpha = metadata.get(ALPHA_KEY, "?")
        facts["rank, alpha"] += f", {alpha}"
    tags = top_tags(metadata.get(TAGS_KEY, ""))
    if tags:
        facts["tags"] = tags
    other_keys = sorted(metadata.keys() - shown_keys)
    if other_keys:
        facts["other metadata"] = ", ".join(other_keys)
    return facts


def first_value(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    """Return the value of the first key that has one; "None" and empty texts do not count."""
    for key in keys:
        value = metadata.get(key, "")
        if value not in ("", "None"):
            return value
    return None


def top_tags(text: str) -> str:
    """Return the most frequent tags of kohya's ss_tag_frequency; empty if it is not readable.

    `text`: JSON of {folder: {tag: count}}."""
    counts: dict[str, int] = {}
    try:
        for folder in json.loads(text).values():
            for tag, count in folder.items():
                name = tag.strip()
                counts[name] = counts.get(name, 0) + int(count)
    except (ValueError, AttributeError, TypeError):
        return ""
    by_count = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{tag} {count}" for tag, count in by_count[:MAX_TAGS])
