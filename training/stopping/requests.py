"""Requests to save or to stop: by a signal, a file or the clock, on any process of a run."""

import time
from pathlib import Path

from training.distributed.consensus import Consensus
from training.run_folder import SAVE_FILE
from training.stopping.signals import SignalHandler, StopRequest

POLL_FILE_EVERY = 1.0
"""Seconds between two looks for the file."""


class Requests:
    """Collects the requests of all processes, and agrees on them once per step."""

    def __init__(
        self,
        consensus: Consensus,
        signals: SignalHandler,
        folder: Path,
        every_minutes: float,
        is_main: bool,
    ):
        self.consensus, self.signals, self.is_main = consensus, signals, is_main
        self.save_file = folder / SAVE_FILE
        self.save_every = 60 * every_minutes
        self.agreed = StopRequest.NONE
        self.saved_at = self.polled_at = time.monotonic()

    def note_checkpoint(self) -> None:
        """Restart the clock, because a checkpoint was written."""
        self.saved_at = time.monotonic()

    def post(self) -> None:
        """Send this process's request to the others, without waiting. Collective.

        WHEN: before the last backward pass of a step, which then hides the communication."""
        if self.consensus.num_processes > 1:
            self.consensus.start_max(self._own_request())

    def collect(self) -> StopRequest:
        """Return the largest request of all processes at their last `post`."""
        if self.consensus.num_processes > 1:
            request = StopRequest(self.consensus.finish_max())
        else:
            request = self._own_request()
        request = max(self.agreed, request)
        self.agreed = StopRequest.NONE
        return request

    @property
    def has_signal_to_stop(self) -> bool:
        """True if a signal stops this process. Others may not know it yet."""
        return self.signals.request.stops

    def must_stop(self) -> bool:
        """Return whether any process has a request to stop, as of now. Collective."""
        self.agreed = max(self.agreed, StopRequest(self.consensus.max_now(self._own_request())))
        return self.agreed.stops

    def _own_request(self) -> StopRequest:
        """Return this process's request. SAVE is returned once; requests to stop are returned again
        and again."""
        request = self.signals.take_request()
        if self.is_main and self._is_save_due():
            return max(request, StopRequest.SAVE)
        return request

    def _is_save_due(self) -> bool:
        now = time.monotonic()
        if self.save_every and now - self.saved_at > self.save_every:
            self.saved_at = now
            return True
        if now - self.polled_at < POLL_FILE_EVERY:
            return False
        self.polled_at = now
        try:
            self.save_file.unlink()
        except OSError:  # there is no such file, or it cannot be removed
            return False
        return True
