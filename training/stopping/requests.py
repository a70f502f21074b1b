"""What a run is asked to do while it trains, by signals, by a file and by the clock, on any of its ranks."""

import time
from pathlib import Path

from training.distributed.consensus import Agreement
from training.run_folder import SAVE_FILE
from training.stopping.signals import Asked, Interruptions

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

    def post(self) -> None:
        """WHEN: before the last micro-batch of a step, so that the answer is there at its end. Collective."""
        if self.agreement.ranks > 1:
            self.agreement.post(self._mine())

    def next(self) -> Asked:
        """What all ranks are to do after this step: what any of them was asked before its last `post`."""
        here = Asked(self.agreement.read()) if self.agreement.ranks > 1 else self._mine()
        known, self.agreed = max(self.agreed, here), Asked.NOTHING
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
        try:
            self.file.unlink()
        except OSError:  # there is none, or it is none of ours to remove
            return False
        return True
