"""Files with one JSON object per line, which grow while a run trains."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from common.atomic import WriteError, write_file


class JsonLines:
    """A file of JSON rows with a `step` each."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, *rows: dict[str, Any]) -> None:
        """Append rows in one write, so that readers and kills see whole lines."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = json_lines(rows).encode()
        try:
            with self.path.open("a+b") as file:
                if not ends_with_newline(file):  # a kill cut off the last row
                    data = b"\n" + data
                file.write(data)
        except OSError as error:
            raise WriteError(self.path, error) from error

    def rows(self) -> list[dict[str, Any]]:
        """Return all complete rows. A kill may have cut off the last one."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        *complete_lines, _ = text.split("\n")
        rows = []
        for line in complete_lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # a line that a kill cut off
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def truncate(self, step: int) -> int:
        """Remove the rows after `step`; return the step of the last row that the file had, or -1."""
        if not self.path.exists():
            return -1
        rows = self.rows()
        remaining_rows = [row for row in rows if row["step"] <= step]
        write_file(self.path, json_lines(remaining_rows))
        if not rows:
            return -1
        return rows[-1]["step"]


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as lines of JSON."""
    lines = [json.dumps(row) + "\n" for row in rows]
    return "".join(lines)


def ends_with_newline(file: BinaryIO) -> bool:
    """Return whether a file that is open for reading is empty or ends with a newline."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return True
    file.seek(size - 1)
    return file.read(1) == b"\n"
