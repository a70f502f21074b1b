"""Announcements of work that takes long, so that no program is silent for more than a few seconds."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

DELAY = 2.0
"""Seconds after which a block is announced."""
REPEAT = 30.0
"""Seconds between two announcements of one block."""


@contextmanager
def announced(text: str) -> Iterator[None]:
    """Say on stderr what a block does, if it takes long, and at its end how long it took.

    Only the main process speaks. Progress bars are not broken."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    announcement = Announcement(text)
    announcement.thread.start()
    try:
        yield
    finally:
        announcement.end()


class Announcement:
    """Speaks in a thread while a block runs."""

    def __init__(self, text: str):
        self.text = text
        self.started_at = time.monotonic()
        self.is_over = threading.Event()
        self.was_made = False
        self.thread = threading.Thread(target=self._speak, daemon=True)

    def _speak(self) -> None:
        if self.is_over.wait(DELAY):
            return
        self.was_made = True
        say(f"{self.text} ...")
        while not self.is_over.wait(REPEAT):
            say(f"{self.text}: {self.seconds:.0f} s so far")

    def end(self) -> None:
        """Stop speaking. WHEN: at the end of the block."""
        self.is_over.set()
        self.thread.join()
        if self.was_made:
            say(f"{self.text}: took {self.seconds:.1f} s")

    @property
    def seconds(self) -> float:
        """Return the time since the start of the block."""
        return time.monotonic() - self.started_at


def say(line: str) -> None:
    """Print a line to stderr, without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)
