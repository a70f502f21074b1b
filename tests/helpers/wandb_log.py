"""Reads an offline wandb run: LevelDB's log format (blocks of crc, length, type, data) holding protobuf records."""

from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER, RECORD_HEADER, BLOCK = 7, 7, 32768
LAST_OF_RECORD = (1, 4)  # types: a whole record, and the last piece of a record


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
