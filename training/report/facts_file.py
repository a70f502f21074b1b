"""report.json: facts about a run that report.html shows and that no other file has."""

import json
from pathlib import Path
from typing import Any

from training.run_folder import FACTS_FILE

NO_FACTS: dict[str, Any] = {
    "summary": "",
    "versions": {},
    "hardware": {},
    "planned_bytes": {},
    "buckets": [],
    "num_trained": 0,
    "num_held_out": 0,
    "dataset": "",
    "noise_levels": [],
    "prompts": [],
    "media": "image",
    "has_control_images": False,
    "trigger_words": "",
    "comfyui_reads_diffusers": True,
    "is_modular": False,
    "slider": [],
    "pictures": [],
    "small_images": "",
}
"""Facts that a file may lack."""
PROMPT_KEYS = ("text", "negative", "width", "height", "seed", "guidance_scale", "strength")
PICTURE_KEYS = ("name", "caption", "width", "height", "is_held_out", "image")
BUCKET_KEYS = ("resolution", "count")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of the run in a folder; empty if the file is missing or not readable.

    Facts of another type than a run writes are left out."""
    path = folder / FACTS_FILE
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    facts = dict(NO_FACTS)
    for name, default in NO_FACTS.items():
        expected_type = type(default)
        value = content.get(name, default)
        if isinstance(value, expected_type):
            facts[name] = value
    facts["prompts"] = complete_entries(facts["prompts"], PROMPT_KEYS)
    facts["pictures"] = complete_entries(facts["pictures"], PICTURE_KEYS)
    facts["buckets"] = complete_entries(facts["buckets"], BUCKET_KEYS)
    return facts


def complete_entries(entries: list[Any], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the entries that have all keys."""
    expected_keys = {*keys}
    complete = []
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        if expected_keys <= entry.keys():
            complete.append(entry)
    return complete
