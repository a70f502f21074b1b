"""One rank of a run of train_lora.py that takes its steps when benchmarks/scaling.py says so, timed
and counted.

A line on stdin is a number of steps to take, or "save"; one line of JSON on stdout answers each.
The run is the script's own but for its end: nothing is written after the last step.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

now = (
    time.perf_counter
)  # on Linux the same clock in all processes, so that the times of two ranks can be compared


class Probe:
    """Where the seconds of a step go, from the outside: the run's own methods, wrapped."""

    def __init__(self) -> None:
        self.update = (0.0, 0.0)
        self.reductions: list[list[float]] = []
        self.written = 0.0

    def patches(self) -> list[Any]:
        import training.trainer
        from training.distributed import rank_check
        from training.trainer import Run

        hook, write = rank_check.allreduce_hook, training.trainer.write
        update, batches = Run._update, Run.batches

        def timed_hook(state, bucket):
            """From the bucket being full to its mean being there; DDP waits for that at the end of
            the backward."""
            mine = [now(), 0.0]
            self.reductions.append(mine)

            def ended(future):
                mine[1] = now()
                return future.value()

            return hook(state, bucket).then(ended)

        def timed_update(run: Run) -> None:
            begin = now()
            update(run)
            self.update = begin, now()

        def timed_write(run: Run) -> None:
            begin = now()
            write(run)
            self.written = now() - begin

        return [
            patch.object(rank_check, "allreduce_hook", timed_hook),
            patch.object(Run, "_update", timed_update),
            patch.object(training.trainer, "write", timed_write),
            patch.object(Run, "batches", lambda run: self.batches(run, batches(run))),
            patch.multiple(
                "training.finish", finish=lambda run: None, write=lambda run, finished: None
            ),
        ]

    def steps(self, source: Iterator, count: int, records: list[dict]) -> Iterator:
        """Batches for `count` steps; a record of each is in `records` when the next is asked for."""
        for _ in range(count):
            self.reductions.clear()
            begin, cpu = now(), time.process_time()
            batch = next(source)
            ready = now()
            yield batch
            end, (computed, updated) = now(), self.update
            reduced = sum(b - a for a, b in self.reductions)
            records.append(
                {
                    "step": end - begin,
                    "data": ready - begin,
                    "forward+backward": computed - ready - reduced,
                    "reduction": reduced,
                    "optimizer": updated - computed,
                    "rest": end - updated,
                    "cpu": time.process_time() - cpu,
                    "reductions": self.reductions[:],
                }
            )

    def batches(self, run: Any, source: Iterator) -> Iterator:
        """In place of Run.batches: steps when they are asked for."""
        for line in sys.stdin:
            asked, records, seen = json.loads(line), [], collectives()
            if asked == "save":
                run.save()
                answer({"write": self.written, "files": files_of(run) if run.main else {}})
                continue
            yield from self.steps(source, asked, records)
            new = [values for number, values in collectives().items() if number not in seen]
            trained = run.parts.adapted.named_parameters().values()
            size = sum(p.numel() * p.element_size() for p in trained)
            answer({"steps": records, "collectives": new, "adapter_bytes": size})


def files_of(run: Any) -> dict[str, int]:
    newest = max((run.folder / "checkpoints").glob("step_*"))
    return {path.name: path.stat().st_size for path in newest.iterdir()}


def collectives() -> dict[int, list]:
    """The last collectives of this process by number, from torch's flight recorder: name, group, element types, sizes.
    Whoever called them, Python or DDP, they are in there."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import _dump_fr_trace_json

    entries = json.loads(_dump_fr_trace_json()).get("entries", []) if dist.is_initialized() else []
    return {
        e["record_id"]: [
            e["profiling_name"],
            int(e["process_group"][0]),
            e["input_dtypes"],
            e["input_sizes"],
        ]
        for e in entries
    }


def answer(value: dict) -> None:
    print(json.dumps(value), file=CHANNEL, flush=True)


def main() -> int:
    import train_lora
    from training.cli import load_config
    from training.stopping.signals import Interruptions

    for one in Probe().patches():
        one.start()
    return train_lora.run_training(load_config(sys.argv[1:]), Interruptions())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    CHANNEL = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the run prints is not for the one who reads the answers
    sys.exit(main())
