"""Checks of arguments that several commands have. Imports no torch, and opens no file."""

import math
import re
from pathlib import Path

PEFT_CONFIG = "adapter_config.json"


def overlaps(input_path: Path, out: Path) -> bool:
    """Return whether writing `out` would change an input: they are equal, or one is in the
    other."""
    source = input_path.resolve()
    target = out.resolve()
    if source == target:
        return True
    if target in source.parents:
        return True
    return source.is_dir() and source in target.parents


def is_replaceable(out: Path, marker_file: str | None) -> bool:
    """Return whether an existing path is of the type that is written."""
    expected_file = out if marker_file is None else out / marker_file
    return expected_file.is_file()


def adapter_errors(name: str, path: str) -> list[str]:
    """Return an error if a path cannot be an adapter. `name`: of the argument."""
    adapter = Path(path)
    if not adapter.exists():
        return [f"{name} {path}: does not exist"]
    has_config = (adapter / PEFT_CONFIG).is_file()
    if adapter.is_dir() and not has_config:
        return [
            f"{name} {path}: is a folder without {PEFT_CONFIG}; expected a .safetensors file or a "
            "folder of PEFT"
        ]
    return []


def pattern_errors(patterns: tuple[str, ...]) -> list[str]:
    """Return the errors in the regular expressions of --drop."""
    errors = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            errors.append(f"--drop {pattern}: is not a regular expression ({error})")
    return errors


def rank_errors(rank: int | None, energy: float | None = None) -> list[str]:
    """Return the errors in a rank and an energy. At most one of them may be set."""
    errors = []
    if rank is not None and rank < 1:
        errors.append(f"--rank {rank}: must be at least 1")
    if energy is None:
        return errors
    if not 0 < energy <= 1:
        errors.append(f"--energy {energy:g}: must be above 0 and at most 1")
    if rank is not None:
        errors.append(
            f"--rank {rank} and --energy {energy:g}: cannot be used together. Choose the rank, or "
            "the share of the energy to keep"
        )
    return errors


def number_or_nan(text: str) -> float:
    """Return a text as a number; NaN if it is not one."""
    try:
        return float(text)
    except ValueError:
        return math.nan
