"""What goes wrong on one rank of several, for tests/ranks.py."""

import os
import signal
import time

RANK = int(os.environ.get("RANK", "0"))


def at_step(step: int, rank: int, act) -> None:
    """Has `rank` do `act` when it has taken `step` steps."""
    from training.callbacks import HandleRequests

    original = HandleRequests.after_step

    def answer(self):
        if self.trainer.state.step == step and rank == RANK:
            act()
        original(self)

    HandleRequests.after_step = answer


def raises() -> None:
    def act():
        raise ValueError("the disk of rank 1 is on fire")

    at_step(3, 1, act)


def is_killed_once() -> None:
    """Rank 1 dies without a word, the first time that the group runs."""
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    at_step(5, 1, lambda: os.kill(os.getpid(), signal.SIGKILL) if first else None)


class Abandoned(BaseException):
    """What SIGKILL leaves on the disk, without the time that a new process takes."""


def abandons() -> None:
    """A run whose folder is named after steps, as in `LoRA-3-7`, stops dead after each of these, once."""
    from training.callbacks import HandleRequests

    original, done = HandleRequests.after_step, set()

    def answer(self):
        steps = [int(part) for part in self.trainer.services.folder.name.split("-")[1:]]
        here = (self.trainer.services.folder.name, self.trainer.state.step)
        if self.trainer.state.step in steps and here not in done:
            done.add(here)
            raise Abandoned
        original(self)

    HandleRequests.after_step = answer


def hangs() -> None:
    at_step(3, 1, lambda: time.sleep(600))


def gets_signal() -> None:
    at_step(4, 1, lambda: os.kill(os.getpid(), int(os.environ["TEST_SIGNAL"])))


def leaves_an_adapter_out() -> None:
    """DDP does not see one adapter, which then goes its own way on every rank."""
    from torch.nn.parallel import DistributedDataParallel

    original = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model

    def ignore(module, names):
        original(
            module, [*names, next(name for name, p in module.named_parameters() if p.requires_grad)]
        )

    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model = ignore


def drifts() -> None:
    """Rank 1's weights change by a hair after step 3."""
    import torch

    from training.callbacks import CompareRanks

    original = CompareRanks.after_step

    def after(self):
        if self.state.step == 3 and RANK == 1:
            with torch.no_grad():
                next(iter(self.rank_check.trained.values())).view(-1)[0].mul_(1 + 1e-6).add_(1e-7)
        original(self)

    CompareRanks.after_step = after


def sees_the_same_samples() -> None:
    """Every rank trains on what rank 0 should."""
    from data.schedule import Schedule

    rows, visits = Schedule.rows, Schedule.visits
    Schedule.rows = lambda self, number: rows(self, number - number % 2)
    Schedule.visits = lambda self, number: visits(self, number - number % 2)


def counts_collectives() -> None:
    """Prints, at the end, the collectives of one step after the first."""
    import torch
    import torch.distributed as dist

    from training.callbacks import EmitMetrics
    from training.distributed.engine import Engine

    calls: list[str] = []
    trained: list[torch.nn.Parameter] = []
    built = Engine.__init__

    def build(self, *args):
        built(self, *args)
        trained.extend(self.trained)

    Engine.__init__ = build

    def counted(name: str, original):
        def call(tensor=None, *args, **kwargs):
            calls.append(f"{name} {getattr(tensor, 'nbytes', 0)}")
            return (
                original(tensor, *args, **kwargs)
                if tensor is not None
                else original(*args, **kwargs)
            )

        return call

    for name in (
        "all_reduce",
        "all_gather",
        "broadcast",
        "reduce_scatter",
        "barrier",
        "all_gather_into_tensor",
    ):
        setattr(dist, name, counted(name, getattr(dist, name)))
    original = EmitMetrics.after_step

    def after(self):
        if self.state.step == 4:
            calls.clear()
        original(self)
        if self.state.step == 5 and RANK == 0:
            gradients = sum(p.nbytes for p in trained)
            print(f"step 5: {calls} of {gradients} bytes of gradients", flush=True)

    EmitMetrics.after_step = after


def is_slow_at_the_end() -> None:
    """Rank 0 exports, and rank 1 draws its first image, for longer than a collective may take."""
    from training import export
    from training.sampling import renderer

    def slowed(function, rank: int):
        seconds = [float(os.environ["TEST_SECONDS"])]

        def call(*args, **kwargs):
            if rank == RANK and seconds:
                time.sleep(seconds.pop())
            return function(*args, **kwargs)

        return call

    export.write_adapter = slowed(export.write_adapter, 0)
    renderer.draw_sample = slowed(renderer.draw_sample, 1)


def cannot_draw() -> None:
    """Rank 1 has no memory for the second image."""
    from training.sampling import renderer

    original, calls = renderer.draw_sample, []

    def draw(*args, **kwargs):
        calls.append(1)
        if RANK == 1 and len(calls) == 2:
            raise MemoryError("rank 1 has no memory left")
        return original(*args, **kwargs)

    renderer.draw_sample = draw


def traces_eagerly() -> None:
    """torch.compile traces blocks as ever, prints a line for each graph, and generates no code."""
    from training import compilation

    def backend(graph, _inputs):
        print("traced a graph", flush=True)
        return graph.forward

    compilation.BACKEND = backend


def has_small_buckets() -> None:
    """DDP sums the gradients of the tiny model in several buckets."""
    from training.distributed import engine

    engine.MAX_BUCKET_MIB = 0.02
