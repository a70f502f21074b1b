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
    "trigger_words": None,
    "pictures": [],
    "small_images": "",
}
"""Facts that a file may lack."""


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of the run in a folder; empty if the file is missing or not readable."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(facts, dict):
        return {}
    return NO_FACTS | facts
