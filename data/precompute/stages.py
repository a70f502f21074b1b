"""Lets the ranks of a run work on files in turn, without a collective: what takes hours must not
run into the timeout of a process group.

Each turn leaves a small JSON file per rank in a folder that all ranks share; the others look for
it. A rank that fails with a DataError leaves that, and the others raise it too.
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from common.errors import DataError
from data.store.hashing import is_old, write_beside

POLL = 0.05  # seconds; ten times as long after a minute
DAYS_KEPT = 7
SHARED_WITHIN = 60.0  # seconds in which a new folder must be seen by all


class Turns:
    """`rank` of `ranks`, with a folder of this run in `cache_dir`."""

    def __init__(self, accelerator: Accelerator, cache_dir: Path):
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        token = [uuid.uuid4().hex]
        if self.ranks > 1:
            broadcast_object_list(token)
        self.folder = cache_dir / f".turns-{token[0]}"
        self.count = 0
        if self.rank == 0:
            self._make(cache_dir)
        elif self.ranks > 1:
            self._see()

    def _make(self, cache_dir: Path) -> None:
        for other in cache_dir.glob(
            ".turns-*"
        ):  # of runs that failed on several ranks, or were killed
            if is_old(other, DAYS_KEPT):
                shutil.rmtree(other, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"--data.cache_dir: {cache_dir} cannot be written to: {error}"
            ) from error

    def _see(self) -> None:
        last = time.monotonic() + SHARED_WITHIN
        while not self.folder.is_dir():
            if time.monotonic() > last:
                raise DataError(
                    f"--data.cache_dir: {self.folder.parent} is not the same folder on all nodes: what rank 0 wrote "
                    f"there was not seen by rank {self.rank} in {SHARED_WITHIN:.0f} s. Name a folder on a shared disk"
                )
            time.sleep(POLL)

    def main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on all ranks; plain JSON values."""
        self.count += 1
        if self.rank == 0:
            return self._do(work)
        return self._result_of(0)

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns on each rank, on all ranks; plain JSON values."""
        self.count += 1
        self._do(work)
        return [self._result_of(rank) for rank in range(self.ranks)]

    def close(self) -> None:
        """The last thing: the main rank removes the folder when all others have left."""
        self.count += 1
        if self.rank:
            self._leave({"result": None})
            return
        for rank in range(1, self.ranks):
            self._result_of(rank)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _do(self, work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except Exception as error:  # or the others would wait for ever
            self._tell(self._file(self.rank), error)
            raise
        self._leave({"result": result})
        return result

    def give_up(self, error: BaseException) -> None:
        """Tells ranks that wait for this one, now or later, that it has failed."""
        if self.ranks == 1:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.folder.is_dir():
            self._tell(self._gave_up(self.rank), error)

    def _tell(self, file: Path, error: BaseException) -> None:
        known = isinstance(error, DataError)
        told = {"fault": str(error)} if known else {"crash": f"{type(error).__name__}: {error}"}
        write_beside(file, json.dumps(told))

    def _gave_up(self, rank: int) -> Path:
        return self.folder / f"failed.{rank}.json"

    def _file(self, rank: int) -> Path:
        return self.folder / f"{self.count}.{rank}.json"

    def _leave(self, content: dict[str, Any]) -> None:
        write_beside(self._file(self.rank), json.dumps(content))

    def _result_of(self, rank: int) -> Any:
        started = time.monotonic()
        while True:
            content = read_if_there(self._file(rank)) or read_if_there(self._gave_up(rank))
            if content is not None:
                break
            time.sleep(POLL if time.monotonic() - started < 60 else 10 * POLL)
        if "fault" in content:
            raise DataError(content["fault"])
        if "crash" in content:
            raise RuntimeError(f"rank {rank} failed: {content['crash']}")
        return content["result"]


def read_if_there(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
