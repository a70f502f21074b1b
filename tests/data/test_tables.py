"""Tables of dataclasses on disk: columns follow from the fields, and rows come back as they were written."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from data.precompute.plan import MissingCaption
from data.samples import ListedSample, PlannedSample
from data.store.keys import key_of
from data.store.tables import ROWS_PER_BATCH, Float64, Int64, Table, arrow_schema, new_table


@dataclass(frozen=True)
class Point:
    x: int
    y: Float64


@dataclass(frozen=True)
class Example:
    """A row with a field of every kind."""

    index: Int64
    key: bytes
    name: str
    point: Point
    keys: list[bytes]
    numbers: list[float]
    other_point: Point | None = None
    is_even: bool = True


def example(i: int) -> Example:
    point = Point(-i, i / 3)
    return Example(i, key_of(str(i)), f"row {i}", point, [key_of(f"{i} {n}") for n in range(i % 3)], [0.5] * (i % 2),
                   point if i % 4 == 0 else None, i % 2 == 0)  # fmt: skip


COUNT = 2 * ROWS_PER_BATCH + 7


@pytest.fixture
def table(tmp_path) -> Table[Example]:
    with new_table(tmp_path / "table.arrow", Example) as writer:
        for i in range(COUNT):
            writer.add(example(i))
    return Table(tmp_path / "table.arrow", Example)


def test_columns_follow_from_the_fields():
    schema = arrow_schema(Example)
    assert schema.names == ["index", "key", "name", "point", "keys", "numbers", "other_point", "is_even"]  # fmt: skip
    point = pa.struct([("x", pa.int32()), ("y", pa.float64())])
    assert schema.types == [
        pa.int64(), pa.binary(16), pa.string(), point, pa.list_(pa.binary(16)), pa.list_(pa.float32()), point,
        pa.bool_(),
    ]  # fmt: skip


def test_rows_come_back_in_any_order(table):
    assert len(table) == COUNT
    assert [row for _, row in table.rows()] == [example(i) for i in range(COUNT)]
    indices = [5, ROWS_PER_BATCH, 4, 4, COUNT - 1, 0]
    assert list(table.rows(np.array(indices))) == [(i, example(i)) for i in indices]
    assert table[ROWS_PER_BATCH - 1] == example(ROWS_PER_BATCH - 1)


def test_columns_come_back_over_all_batches(table):
    rows = [example(i) for i in range(COUNT)]
    assert table.column("index").tolist() == list(range(COUNT))
    assert table.column("is_even").tolist() == [row.is_even for row in rows]
    assert table.column("numbers").tolist() == [0.5] * (COUNT // 2)
    assert table.lengths("keys").tolist() == [len(row.keys) for row in rows]
    keys = [key for row in rows for key in row.keys]
    assert table.keys("keys").tolist() == [key.rstrip(b"\0") for key in keys]
    assert table.nested_column("point", "y").tolist() == [row.point.y for row in rows]
    is_none = table.is_none("other_point")
    assert is_none.tolist() == [row.other_point is None for row in rows]
    assert table.nested_column("other_point", "x")[~is_none].tolist() == list(range(0, -COUNT, -4))


@pytest.mark.parametrize("row_class", [Example, ListedSample, PlannedSample, MissingCaption])
def test_a_table_may_be_empty(tmp_path, row_class):
    with new_table(tmp_path / "empty.arrow", row_class):
        pass
    table = Table(tmp_path / "empty.arrow", row_class)
    assert len(table) == 0
    assert list(table.rows()) == []
    for field in arrow_schema(row_class):
        if pa.types.is_list(field.type):
            assert len(table.lengths(field.name)) == 0
        elif pa.types.is_fixed_size_binary(field.type):
            assert len(table.keys(field.name)) == 0


def test_a_table_exists_when_it_is_complete(tmp_path):
    def write() -> None:
        with new_table(tmp_path / "a.arrow", Point) as writer:
            writer.add(Point(1, 2.0))
            assert not (tmp_path / "a.arrow").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_other_rows_is_an_error(table, tmp_path):
    with pytest.raises(pa.ArrowException, match=r"table\.arrow is not a table of Point rows"):
        Table(tmp_path / "table.arrow", Point)
    with new_table(tmp_path / "b.arrow", Point) as writer:
        writer.add(Point(2**40, 0.0))
        with pytest.raises(pa.ArrowException, match="too large"):
            writer.flush()
        writer.rows.clear()
