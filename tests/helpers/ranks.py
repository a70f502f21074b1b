"""One rank of several runs of train_lora.py, one after the other: what starts once is loaded once.

`accelerate launch ... tests/helpers/ranks.py RUNS.json [FAULT]`: RUNS.json holds a list of command lines, FAULT names a
function of helpers/rank_faults.py. With Accelerate's config for FSDP or DeepSpeed they are used as on GPUs, over gloo,
which Accelerate alone would not do on CPUs.
"""

import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
ZERO = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
SHARDED = ZERO or os.environ.get("ACCELERATE_USE_FSDP") == "true"
if SHARDED:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def main() -> int:
    """Runs all in one process group; stops at the first that does not end well, with its exit code."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    import train_lora
    from helpers import rank_faults
    from helpers.project import reset_accelerate
    from training import run

    if len(sys.argv) > 2:
        getattr(rank_faults, sys.argv[2])()
    leave, run.leave_process_group = run.leave_process_group, lambda *_: None
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        reset_accelerate()
        if SHARDED:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = (
                DistributedType.MULTI_GPU
            )  # then it looks for them
        if ZERO:
            import deepspeed

            os.environ.pop("ACCELERATE_USE_CPU", None)
            deepspeed.init_distributed("gloo")
        try:
            if status := train_lora.main(argv):
                return status
        except rank_faults.Abandoned:
            print("abandoned", flush=True)
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
