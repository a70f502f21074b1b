"""Tables on disk: Arrow files whose rows are dataclasses, with a column for each field.

A table is written row by row, and read a few rows or one column at a time, so that no table is ever
in memory as a whole.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa

from common.atomic import new_file
from data.store.keys import KEY_BYTES, KEY_DTYPE

ROWS_PER_BATCH = 1000
Int64 = Annotated[int, pa.int64()]
Float64 = Annotated[float, pa.float64()]
ARROW_TYPES: dict[Any, pa.DataType] = {
    bool: pa.bool_(),
    bytes: pa.binary(KEY_BYTES),
    float: pa.float32(),
    int: pa.int32(),
    str: pa.string(),
}
"""Types of fields. All bytes are keys, and numbers have 32 bits unless they are marked."""
Row = TypeVar("Row")


def arrow_type(hint: Any) -> pa.DataType:
    """Return the Arrow type of a field.

    Fields are numbers, texts, keys, dataclasses of these, lists of these, or None."""
    if hint in ARROW_TYPES:
        return ARROW_TYPES[hint]
    if get_origin(hint) is Annotated:
        _, marked_type = get_args(hint)
        return marked_type
    if is_dataclass(hint):
        return pa.struct(list(arrow_schema(hint)))
    (item_type,) = [item for item in get_args(hint) if item is not NoneType]
    if get_origin(hint) is list:
        return pa.list_(arrow_type(item_type))
    return arrow_type(item_type)


def arrow_schema(row_class: Any) -> pa.Schema:
    """Return the columns of a table whose rows are of this dataclass."""
    hints = get_type_hints(row_class, include_extras=True)
    columns = []
    for field in fields(row_class):
        column_type = arrow_type(hints[field.name])
        columns.append((field.name, column_type))
    return pa.schema(columns)


@cache
def nested_classes(row_class: Hashable) -> dict[str, Any]:
    """Return the dataclasses among the fields of a dataclass, by field name."""
    nested = {}
    for name, hint in get_type_hints(row_class).items():
        for item_type in (hint, *get_args(hint)):
            if is_dataclass(item_type):
                nested[name] = item_type
    return nested


def to_cell(value: Any) -> Any:
    """Return the value of a field as Arrow takes it."""
    return vars(value) if is_dataclass(value) else value


def from_cells(row_class: type[Row], cells: dict[str, Any]) -> Row:
    """Return the row with these cells."""
    for name, nested_class in nested_classes(row_class).items():  # type: ignore[arg-type]
        nested_cells = cells[name]
        if nested_cells is None:
            continue
        cells[name] = nested_class(**nested_cells)
    return row_class(**cells)


class TableWriter(Generic[Row]):
    """Takes rows one at a time and writes them in batches."""

    def __init__(self, sink: pa.RecordBatchFileWriter, schema: pa.Schema):
        self.sink, self.schema = sink, schema
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.rows) == ROWS_PER_BATCH:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are not written yet."""
        if not self.rows:
            return
        columns = []
        for field in self.schema:
            cells = [to_cell(getattr(row, field.name)) for row in self.rows]
            columns.append(pa.array(cells, field.type))
        batch = pa.RecordBatch.from_arrays(columns, schema=self.schema)
        self.sink.write_batch(batch)
        self.rows = []


@contextmanager
def new_table(path: Path, row_class: type[Row]) -> Iterator[TableWriter[Row]]:
    """Yield a writer of a table, which exists when the block has ended without an error."""
    schema = arrow_schema(row_class)
    with (
        new_file(path, is_shared=True) as partial_path,
        pa.OSFile(str(partial_path), "wb") as file,
        pa.ipc.new_file(file, schema) as sink,
    ):
        writer = TableWriter[Row](sink, schema)
        yield writer
        writer.flush()


def table_to_bytes(rows: list[Row], row_class: type[Row]) -> bytes:
    """Return the content of a small table file."""
    schema = arrow_schema(row_class)
    file = pa.BufferOutputStream()
    with pa.ipc.new_file(file, schema) as sink:
        writer = TableWriter[Row](sink, schema)
        for row in rows:
            writer.add(row)
        writer.flush()
    return file.getvalue().to_pybytes()


class Table(Generic[Row]):
    """A table on disk. Raises OSError or pa.ArrowException if its file is missing or damaged."""

    def __init__(self, path: Path, row_class: type[Row]):
        self.path = path
        self.row_class = row_class
        self.schema = arrow_schema(row_class)
        with pa.OSFile(str(path), "rb") as file:
            stored_schema = pa.ipc.open_file(file).schema
        if stored_schema != self.schema:
            raise pa.ArrowInvalid(f"{path} is not a table of {row_class.__name__} rows")

    @cached_property
    def num_rows(self) -> int:
        """Number of rows."""
        first_column = self.schema.names[0]
        return sum(len(column) for column in self._read_column(first_column))

    @cached_property
    def batches(self) -> list[pa.RecordBatch]:
        """The rows in batches, mapped from the file."""
        mapped = pa.memory_map(str(self.path))
        return pa.ipc.open_file(mapped).read_all().to_batches()

    @cached_property
    def batch_ends(self) -> np.ndarray:
        """Index after the last row of each batch."""
        lengths = [len(batch) for batch in self.batches]
        return np.cumsum(lengths)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        """Return the row with this index."""
        indices = np.array([index])
        _, row = next(self.rows(indices))
        return row

    def rows(self, indices: np.ndarray | None = None) -> Iterator[tuple[int, Row]]:
        """Yield index and row of all rows, or of those with these indices, in their order."""
        if indices is None:
            indices = np.arange(len(self))
        for start in range(0, len(indices), ROWS_PER_BATCH):
            end = start + ROWS_PER_BATCH
            yield from self._few_rows(indices[start:end])

    def _few_rows(self, indices: np.ndarray) -> Iterator[tuple[int, Row]]:
        """Yield index and row, for so few indices that all rows may be in memory."""
        batch_numbers = np.searchsorted(self.batch_ends, indices, side="right")
        changes = np.flatnonzero(np.diff(batch_numbers)) + 1
        groups = np.split(indices, changes)
        numbers = batch_numbers[np.append(0, changes)]
        for group, number in zip(groups, numbers.tolist(), strict=True):
            batch = self.batches[number]
            first = self.batch_ends[number] - len(batch)
            positions = pa.array(group - first)
            cells_of_rows = batch.take(positions).to_pylist()
            for index, cells in zip(group.tolist(), cells_of_rows, strict=True):
                yield index, from_cells(self.row_class, cells)

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers; of a list column, the items of all rows one after another."""
        dtype = self._item_type(name).to_pandas_dtype()
        return self._collect(name, dtype, self._num_items(name), numbers_of)

    def nested_column(self, name: str, nested_name: str) -> np.ndarray:
        """Return a number of the dataclass in a column."""
        nested_field = self._item_type(name).field(nested_name)
        dtype = nested_field.type.to_pandas_dtype()

        def nested_numbers(column: pa.Array) -> np.ndarray:
            return numbers_of(column.field(nested_name))

        return self._collect(name, dtype, len(self), nested_numbers)

    def is_none(self, name: str) -> np.ndarray:
        """Return whether each row has no value in a column."""
        return self._collect(name, bool, len(self), missing_of)

    def keys(self, name: str) -> np.ndarray:
        """Return a column of keys; of a list column, the keys of all rows one after another."""
        return self._collect(name, KEY_DTYPE, self._num_items(name), keys_of)

    def lengths(self, name: str) -> np.ndarray:
        """Return the length of each row's list in a list column."""
        return self._collect(name, np.int64, len(self), lengths_of)

    def _item_type(self, name: str) -> pa.DataType:
        """Return the type of a column, or of the items of a list column."""
        column_type = self.schema.field(name).type
        return column_type.value_type if pa.types.is_list(column_type) else column_type

    def _num_items(self, name: str) -> int:
        """Return the number of items in all lists of a list column, or of rows."""
        if pa.types.is_list(self.schema.field(name).type):
            return int(self.lengths(name).sum())
        return len(self)

    def _collect(
        self, name: str, dtype: Any, num_values: int, to_array: Callable[[pa.Array], np.ndarray]
    ) -> np.ndarray:
        """Return the arrays of all batches of a column one after another."""
        result = np.empty(num_values, dtype)
        position = 0
        for column in self._read_column(name):
            values = to_array(column)
            end = position + len(values)
            result[position:end] = values
            position = end
        return result

    def _read_column(self, name: str) -> Iterator[pa.Array]:
        """Yield a column batch by batch.

        Nothing else of the table is in memory."""
        index = self.schema.get_field_index(name)
        options = pa.ipc.IpcReadOptions(included_fields=[index])
        with pa.OSFile(str(self.path), "rb") as file:
            reader = pa.ipc.open_file(file, options=options)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number).column(name)


def list_items(column: pa.Array) -> pa.Array:
    """Return the items of a list column one after another, or another column unchanged."""
    return column.flatten() if pa.types.is_list(column.type) else column


def numbers_of(column: pa.Array) -> np.ndarray:
    """Return the numbers of a column or of its lists."""
    return list_items(column).to_numpy(zero_copy_only=False)


def lengths_of(column: pa.Array) -> np.ndarray:
    """Return the lengths of the lists of a column."""
    return np.diff(column.offsets.to_numpy())


def missing_of(column: pa.Array) -> np.ndarray:
    return column.is_null().to_numpy(zero_copy_only=False)


def keys_of(column: pa.Array) -> np.ndarray:
    """Return the keys of a column or of its lists."""
    items = list_items(column)
    _, data = items.buffers()
    if data is None:
        return np.empty(0, KEY_DTYPE)
    all_keys = np.frombuffer(data, KEY_DTYPE)
    first = items.offset
    last = first + len(items)
    return all_keys[first:last]


def list_starts(lengths: np.ndarray) -> np.ndarray:
    """Return the position of each list's first item, if the items follow one after another."""
    return np.cumsum(lengths) - lengths


def list_owners(lengths: np.ndarray) -> np.ndarray:
    """Return the list to which each item belongs, if the items follow one after another."""
    return np.repeat(np.arange(len(lengths)), lengths)
