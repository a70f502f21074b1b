"""Configurations of released models, by Hub id: for planning without a network.

released_models.json has the values of the models' own configuration files. There are no weights,
vocabularies or tokenizers in it.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

CONFIG_NAMES = {"scheduler": "scheduler_config.json"}
"""Component -> name of its configuration; config.json for all other components."""


@cache
def released_models() -> dict[str, dict[str, Any]]:
    """Return the models by name: `hub_ids`, `pipeline`, and `components` (name -> config)."""
    path = Path(__file__).with_name("released_models.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    models = {}
    for name, model in content["models"].items():
        components = {}
        for component, config_name in model["components"].items():
            components[component] = content["components"][config_name]
        models[name] = {**model, "components": components}
    return models


def find_released_model(hub_id: str) -> dict[str, Any] | None:
    """Return the released model with this Hub id, or None."""
    for model in released_models().values():
        if hub_id in model["hub_ids"]:
            return model
    return None


def released_hub_ids() -> list[str]:
    """Return the Hub ids of all released models."""
    hub_ids: list[str] = []
    for model in released_models().values():
        hub_ids += model["hub_ids"]
    return hub_ids


@contextmanager
def configuration_folder(model: dict[str, Any]) -> Iterator[Path]:
    """Write the configurations of a released model as a diffusers folder, for a block."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_json(root / "model_index.json", pipeline_index(model))
        for component, config in model["components"].items():
            file_name = CONFIG_NAMES.get(component, "config.json")
            write_json(root / component / file_name, config)
        yield root


def pipeline_index(model: dict[str, Any]) -> dict[str, Any]:
    """Return the model_index.json of a released model."""
    index: dict[str, Any] = {"_class_name": model["pipeline"], **model.get("pipeline_options", {})}
    for component, config in model["components"].items():
        if "_class_name" in config:
            index[component] = ["diffusers", config["_class_name"]]
        else:
            index[component] = ["transformers", config["architectures"][0]]
    return index


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
