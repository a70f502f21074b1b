"""What a run is asked to do while it trains, by signals, by a file and by the clock, on any of its ranks."""

import time
from pathlib import Path

from training.agreement import Agreement
from training.interruption import Asked, Interruptions
from training.rundir import SAVE_FILE

LOOK_EVERY = 1.0  # seconds between two looks for the file


class Requests:
    """Asked on one rank, known to all at the same step."""

    def __init__(
        self, agreement: Agreement, interruptions: Interruptions, folder: Path, every_minutes: float, main: bool
    ):
        self.agreement, self.interruptions, self.main = agreement, interruptions, main
        self.file, self.seconds = folder / SAVE_FILE, 60 * every_minutes
        self.agreed = Asked.NOTHING
        self.saved_at = self.looked_at = time.monotonic()

    def saved(self) -> None:
        """A checkpoint was written."""
        self.saved_at = time.monotonic()

    def next(self) -> Asked:
        """What all ranks are to do after this step; asked of any of them a step ago. Collective, but none waits."""
        known = max(self.agreed, Asked(self.agreement.later(self._mine())))
        self.agreed = Asked.NOTHING
        return known

    def leaving(self) -> bool:
        """Whether any rank is to leave, as of now. Collective."""
        self.agreed = max(self.agreed, Asked(self.agreement.now(self._mine())))
        return self.agreed.leaves

    def _mine(self) -> Asked:
        """What this rank passes on. A wish to save is passed on once; one to leave stays."""
        asked = self.interruptions.take()
        return max(asked, Asked.SAVE) if self.main and self._is_time() else asked

    def _is_time(self) -> bool:
        now = time.monotonic()
        if self.seconds and now - self.saved_at > self.seconds:
            self.saved_at = now
            return True
        if now - self.looked_at < LOOK_EVERY:
            return False
        self.looked_at = now
        if not self.file.exists():
            return False
        self.file.unlink(missing_ok=True)
        return True
