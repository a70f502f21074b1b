"""One process of a run that takes its steps when benchmarks/scaling.py requests them, timed and
counted.

A line on stdin is a number of steps to take, or "save". Each is answered by a line of JSON on
stdout. The run is that of train_lora.py, except that nothing is exported.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

now = time.perf_counter
"""On Linux the same clock in all processes, so that times of two processes can be compared."""


class StepTimer:
    """Times the parts of a step by wrapping the methods that do them."""

    def __init__(self) -> None:
        self.update_began = 0.0
        self.update_ended = 0.0
        self.reductions: list[list[float]] = []
        """Start and end of each reduction since the list was last cleared."""
        self.save_seconds = 0.0

    def patches(self) -> list[Any]:
        """Return the patches that measure, to be started before the run."""
        from training.checkpoints.resume import RunCheckpoints
        from training.distributed import rank_check
        from training.distributed.rank_check import RankCheck
        from training.reporting.reporter import Reporter
        from training.trainer import Trainer

        reduce, check_gradients = rank_check.allreduce_hook, RankCheck.check_gradients
        advance, save, train = Reporter.advance, RunCheckpoints.save, Trainer.train

        def timed_reduce(state: Any, bucket: Any) -> Any:
            """Time a reduction from the full bucket to its mean. DDP waits for the mean at the end
            of the backward pass."""
            times = [now(), 0.0]
            self.reductions.append(times)

            def note_end(future: Any) -> Any:
                times[1] = now()
                return future.value()

            return reduce(state, bucket).then(note_end)

        def timed_check(check: RankCheck) -> None:
            """Begin the update: the check is the first action after the backward pass."""
            self.update_began = now()
            check_gradients(check)

        def timed_advance(reporter: Reporter) -> None:
            """End the update: the progress bar is the last action of a step before its
            callbacks."""
            advance(reporter)
            self.update_ended = now()

        def timed_save(checkpoints: RunCheckpoints, state: Any) -> None:
            begin = now()
            save(checkpoints, state)
            self.save_seconds = now() - begin

        def train_on_request(trainer: Trainer) -> None:
            trainer.batches = RequestedBatches(trainer, self)  # type: ignore[assignment]
            train(trainer)

        return [
            patch.object(rank_check, "allreduce_hook", timed_reduce),
            patch.object(RankCheck, "check_gradients", timed_check),
            patch.object(Reporter, "advance", timed_advance),
            patch.object(RunCheckpoints, "save", timed_save),
            patch.object(Trainer, "train", train_on_request),
        ]


class RequestedBatches:
    """Batches of a run, for as many steps as are requested on stdin. The run stops when stdin
    ends."""

    def __init__(self, trainer: Any, timer: StepTimer):
        self.trainer, self.timer = trainer, timer
        self.stream = trainer.batches

    def from_step(self, step: int, micro_batches_per_step: int) -> Iterator[Any]:
        """Yield batches. After the last requested one, the answer is sent."""
        from training.stopping.signals import RunStopped, StopRequest

        source = self.stream.from_step(step, micro_batches_per_step)
        for line in sys.stdin:
            request = json.loads(line)
            if request == "save":
                self._save()
            else:
                yield from self._steps(source, request)
        raise RunStopped(StopRequest.TERMINATE, "nothing more is requested", is_agreed=True)

    def _steps(self, source: Iterator[Any], count: int) -> Iterator[Any]:
        """Yield the batches of `count` steps, then answer with the times and the collectives."""
        earlier_collectives = collectives()
        records = []
        for _ in range(count):
            self.timer.reductions.clear()
            begin, cpu_begin = now(), time.process_time()
            batch = next(source)
            ready = now()
            yield batch
            records.append(self._record(begin, cpu_begin, ready))
        new_collectives = [
            entry for number, entry in collectives().items() if number not in earlier_collectives
        ]
        parameters = self.trainer.engine.adapted.named_parameters().values()
        adapter_bytes = sum(
            parameter.numel() * parameter.element_size() for parameter in parameters
        )
        answer({"steps": records, "collectives": new_collectives, "adapter_bytes": adapter_bytes})

    def _record(self, begin: float, cpu_begin: float, ready: float) -> dict[str, Any]:
        """Return the times of a step that has just ended. `ready`: its batch was loaded then."""
        end, timer = now(), self.timer
        reduction = sum(stop - start for start, stop in timer.reductions)
        return {
            "step": end - begin,
            "data": ready - begin,
            "forward+backward": timer.update_began - ready - reduction,
            "reduction": reduction,
            "optimizer": timer.update_ended - timer.update_began,
            "callbacks": end - timer.update_ended,
            "cpu": time.process_time() - cpu_begin,
            "reductions": timer.reductions[:],
        }

    def _save(self) -> None:
        """Write a checkpoint as the run does; answer with its time and its files."""
        from training.callbacks import SaveCheckpoint

        for callback in self.trainer.callbacks:
            if isinstance(callback, SaveCheckpoint):
                callback.save()
                callback.checkpoints.writer.wait()
        services = self.trainer.services
        file_sizes = newest_checkpoint(services.folder) if services.process.is_main else {}
        answer({"seconds": self.timer.save_seconds, "files": file_sizes})


def newest_checkpoint(folder: Path) -> dict[str, int]:
    """Return the files of the newest checkpoint with their sizes in bytes."""
    newest = max((folder / "checkpoints").glob("step_*"))
    return {path.name: path.stat().st_size for path in newest.iterdir()}


def collectives() -> dict[int, list]:
    """Return the last collectives of this process by number: name, group, element types, sizes.

    Torch's flight recorder has all of them, whether Python or DDP called them."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import _dump_fr_trace_json

    if not dist.is_initialized():
        return {}
    entries = json.loads(_dump_fr_trace_json()).get("entries", [])
    return {
        entry["record_id"]: [
            entry["profiling_name"],
            int(entry["process_group"][0]),
            entry["input_dtypes"],
            entry["input_sizes"],
        ]
        for entry in entries
    }


def answer(value: dict[str, Any]) -> None:
    """Send a line of JSON to benchmarks/scaling.py."""
    print(json.dumps(value), file=CHANNEL, flush=True)


def main() -> int:
    """Run the training on request; return the exit code of a run that failed, else 0."""
    from training.cli import load_config
    from training.run import run_training
    from training.stopping.signals import RunStopped, SignalHandler

    for timing_patch in StepTimer().patches():
        timing_patch.start()
    try:
        return run_training(load_config(sys.argv[1:]), SignalHandler())
    except RunStopped:
        return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    # stdout is for the answers; the messages of the run go to stderr
    CHANNEL = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main())
