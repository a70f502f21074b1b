"""Writes checkpoints in a thread, so that training does not wait for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from training.checkpoints import storage
from training.checkpoints.storage import CheckpointError


class CheckpointWriter:
    """Writes the checkpoints of a run one after the other.

    A checkpoint is a copy of the state, so the next steps do not change it."""

    def __init__(self, folder: Path, keep: int):
        """`keep`: number of checkpoints that stay."""
        self.folder = folder
        self.keep = keep
        self.executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="checkpoint",
        )
        self.pending: Future[None] | None = None

    def start(self, step: int, files: dict[str, bytes]) -> None:
        """Start to write a checkpoint when the earlier one is complete. Raises CheckpointError if
        that one failed."""
        self.wait()
        self.pending = self.executor.submit(
            storage.save,
            self.folder,
            step,
            files,
            self.keep,
        )

    def check(self) -> None:
        """Raise CheckpointError if a checkpoint could not be written. Does not wait."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete. Raises CheckpointError if it could not be
        written."""
        pending = self.pending
        self.pending = None
        if pending is not None:
            pending.result()

    def finish(self, say: Callable[[str], None]) -> None:
        """Wait, and report an error as a note. WHEN: another error ends the run."""
        try:
            self.wait()
        except CheckpointError as error:
            say(f"note: {error}")
