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

CONFIG_NAMES = {"scheduler": "scheduler_config.json", "guider": "guider_config.json"}
"""Component -> name of its configuration; config.json for all other components."""


@cache
def released_models() -> dict[str, dict[str, Any]]:
    """Return the models by name: `hub_ids`, `pipeline`, and `components` (name -> config).

    `libraries`: where the classes of components are that diffusers itself does not have."""
    path = Path(__file__).with_name("released_models.json")
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    configs = content["components"]
    for model in content["models"].values():
        components = model["components"]
        for component, config_name in components.items():
            components[component] = complete_config(configs, config_name)
    return content["models"]


def complete_config(configs: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Return a configuration, which may state only how it differs from another one (`like`)."""
    config = dict(configs[name])
    other_name = config.pop("like", None)
    if other_name is None:
        return config
    other_config = complete_config(configs, other_name)
    return {
        **other_config,
        **config,
    }


def find_released_model(hub_id: str | None) -> dict[str, Any] | None:
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
        index = pipeline_index(model)
        write_json(root / "model_index.json", index)
        for component, config in model["components"].items():
            file_name = CONFIG_NAMES.get(component, "config.json")
            path = root / component / file_name
            write_json(path, config)
        yield root


def pipeline_index(model: dict[str, Any]) -> dict[str, Any]:
    """Return the model_index.json of a released model."""
    options = model.get("pipeline_options", {})
    libraries = model.get("libraries", {})
    index: dict[str, Any] = {
        "_class_name": model["pipeline"],
        **options,
    }
    for component, config in model["components"].items():
        class_name = config.get("_class_name")
        if class_name is not None:
            index[component] = [libraries.get(component, "diffusers"), class_name]
            continue
        class_name = config["architectures"][0]
        index[component] = ["transformers", class_name]
    return index


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
