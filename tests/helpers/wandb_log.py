"""Reads an offline wandb run: LevelDB's log format (blocks of crc, length, type, data) holding protobuf records."""

import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER, RECORD_HEADER, BLOCK = 7, 7, 32768
LAST_OF_RECORD = (1, 4)  # types: a whole record, and the last piece of a record


def written_records(path: Path, seconds: float = 20.0) -> list[Record]:
    """Return all records, as soon as wandb's own process has written the last one."""
    deadline = time.monotonic() + seconds
    while True:
        all_records = list(records(path))
        has_ended = any(record.HasField("exit") for record in all_records)
        if has_ended or time.monotonic() > deadline:
            return all_records
        time.sleep(0.2)


def records(path: Path) -> Iterator[Record]:
    """Yield all records of a .wandb file, in order."""
    data, position, pieces = path.read_bytes(), FILE_HEADER, b""
    while position + RECORD_HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < RECORD_HEADER:
            position += room
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        position += RECORD_HEADER
        pieces += data[position : position + length]
        position += length
        if kind in LAST_OF_RECORD:
            record = Record()
            record.ParseFromString(pieces)
            yield record
            pieces = b""
