"""Runs train_lora.py several times on the fake CUDA device, in one process.

`python run.py LIBRARY RUNS.json RECORDS.json`: LIBRARY is the compiled guard.cpp, RUNS.json a list of command lines.
RECORDS.json gets for each its exit code and what it asked of the device, by step; outside of steps the label is null.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from helpers.fake_cuda.build import load_guard  # noqa: E402

load_guard(Path(sys.argv[1]))
os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda"


def main() -> int:
    import train_lora
    from helpers.fake_cuda.device import fake_cuda
    from helpers.project import reset_accelerate
    from helpers.runs import labeled_steps
    from helpers.small_controls import shrink

    shrink()
    results = []
    for options in json.loads(Path(sys.argv[2]).read_text()):
        reset_accelerate()
        with fake_cuda() as record, labeled_steps(record):
            code = train_lora.main(options)
        results.append({"code": code, **as_json(record)})
    Path(sys.argv[3]).write_text(json.dumps(results))
    return 0


def as_json(record: Any) -> dict[str, list]:
    """Each counter as a list of [label, ..., number]."""
    return {
        name: [[*key, number] for key, number in getattr(record, name).items()]
        for name in ("reads", "attention", "products")
    }


if __name__ == "__main__":
    sys.exit(main())
