"""Stages of work on shared files, which all processes of a run take together.

No collective operation is used, because work that takes hours must not run into the timeout of a
process group. After each stage, each process leaves a small JSON file with its result in a shared
folder, and waits for the files of the others. If a process fails with a DataError, all others raise
it too.
"""

import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from common.atomic import remove_old, write_file
from common.errors import DataError
from common.process import ProcessInfo

FOLDER_PREFIX = ".stages-"
FAST_POLL_SECONDS = 0.05
SLOW_POLL_SECONDS = 0.5
FAST_POLL_TIME = 60.0
"""Seconds after which a waiting process looks for files less often."""
SHARED_WITHIN = 60.0
"""Seconds in which all processes must see a new folder."""
MAX_AGE_DAYS = 7
"""Age at which the folder of a run that was killed is removed."""


class Stages:
    """The stages of one run. All processes call its methods in the same order.

    The results of the work are plain JSON values."""

    def __init__(self, process: ProcessInfo, cache_dir: Path):
        self.process = process
        token = [uuid.uuid4().hex]
        if process.count > 1:
            broadcast_object_list(token)
        self.folder = cache_dir / f"{FOLDER_PREFIX}{token[0]}"
        self.stage = 0
        if process.is_main:
            self._make_folder()
        else:
            self._wait_for_folder()

    @classmethod
    @contextmanager
    def opened(cls, process: ProcessInfo, cache_dir: Path) -> "Iterator[Stages]":
        """Open the stages for a block, and remove their folder at its end.

        If the block raises an error, the other processes raise one too."""
        stages = cls(process, cache_dir)
        try:
            yield stages
            stages.close()
        except BaseException as error:
            stages.report_failure(error)
            raise

    def run_on_main(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the main process; return its result on all processes."""
        self.stage += 1
        if self.process.is_main:
            return self._run(work)
        return self._result_of(0)

    def run_on_all(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every process; return the results of all, by process index."""
        self.stage += 1
        self._run(work)
        return [self._result_of(index) for index in range(self.process.count)]

    def close(self) -> None:
        """End the last stage. The main process removes the folder when no process needs it."""
        self.stage += 1
        if not self.process.is_main:
            self._write_result({"result": None})
            return
        for index in range(1, self.process.count):
            self._result_of(index)
        shutil.rmtree(self.folder, ignore_errors=True)

    def report_failure(self, error: BaseException) -> None:
        """Report to the processes that wait for this one, now or later, that it has failed."""
        if self.process.count == 1:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.folder.is_dir():
            write_json(self._failure_path(self.process.index), failure_report(error))

    def _make_folder(self) -> None:
        cache_dir = self.folder.parent
        remove_old(cache_dir.glob(f"{FOLDER_PREFIX}*"), MAX_AGE_DAYS)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"--data.cache_dir {cache_dir}: cannot be written to: {error}"
            raise DataError(message) from error

    def _wait_for_folder(self) -> None:
        deadline = time.monotonic() + SHARED_WITHIN
        while not self.folder.is_dir():
            if time.monotonic() > deadline:
                raise DataError(
                    f"--data.cache_dir {self.folder.parent}: is not the same folder on all nodes. "
                    f"Process {self.process.index} did not see a file of the main process within "
                    f"{SHARED_WITHIN:.0f} s. Use a folder on a shared disk"
                )
            time.sleep(FAST_POLL_SECONDS)

    def _run(self, work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except Exception as error:  # otherwise the other processes would wait forever
            self._write_result(failure_report(error))
            raise
        self._write_result({"result": result})
        return result

    def _result_path(self, index: int) -> Path:
        return self.folder / f"{self.stage}.{index}.json"

    def _failure_path(self, index: int) -> Path:
        return self.folder / f"failed.{index}.json"

    def _write_result(self, content: dict[str, Any]) -> None:
        write_json(self._result_path(self.process.index), content)

    def _result_of(self, index: int) -> Any:
        """Wait for the result of a process in this stage. Raises the error that it failed with."""
        content = self._wait_for_report(index)
        if "error" in content:
            raise DataError(content["error"])
        if "crash" in content:
            raise RuntimeError(f"process {index} failed: {content['crash']}")
        return content["result"]

    def _wait_for_report(self, index: int) -> dict[str, Any]:
        started = time.monotonic()
        while True:
            for path in (self._result_path(index), self._failure_path(index)):
                content = read_json(path)
                if content is not None:
                    return content
            if not self.folder.is_dir():
                raise RuntimeError(f"{self.folder} was removed, so process {index} is not running")
            has_waited_long = time.monotonic() - started > FAST_POLL_TIME
            time.sleep(SLOW_POLL_SECONDS if has_waited_long else FAST_POLL_SECONDS)


def failure_report(error: BaseException) -> dict[str, str]:
    """Return what the other processes need to know about an error."""
    if isinstance(error, DataError):
        return {"error": str(error)}
    return {"crash": f"{type(error).__name__}: {error}"}


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content), is_shared=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file, or None if the file does not exist yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
