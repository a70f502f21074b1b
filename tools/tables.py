"""Tables and lists that the commands print."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

NO_VALUE = "-"
"""Text of an attribute that a layer does not have, such as the rank of a whole matrix."""
FLAT_BLOCK = re.compile(r".*?(_\d+_[a-z]+|mid_block_[a-z]+)")
"""Block at the start of a layer name without dots, as kohya writes it."""
Attributes = Mapping[str, object]
"""Column -> number or text of one layer."""
Fact = str | list[str]
"""A value, or a value and further lines."""


@dataclass
class BlockRow:
    """Sums over the layers of one block."""

    num_layers: int = 0
    values: dict[str, set[object]] = field(default_factory=dict)
    """Column -> the different attributes of the layers."""
    squared_norm: float = 0.0
    squared_error: float = 0.0

    def add(self, attributes: Attributes, norm: float, relative_error: float) -> None:
        """Add a layer. `norm`: of its update; `relative_error`: of the update."""
        self.num_layers += 1
        for column, value in attributes.items():
            values = self.values.setdefault(column, set())
            values.add(value)
        self.squared_norm += norm**2
        self.squared_error += (norm * relative_error) ** 2

    @property
    def norm(self) -> float:
        """Return the norm of all updates together."""
        return math.sqrt(self.squared_norm)

    @property
    def relative_error(self) -> float:
        """Return the error of all updates together, relative to their norm."""
        if not self.squared_norm:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_norm)


@dataclass
class BlockTable:
    """The layers of an adapter, summed by block: `str` is one line per block, and one for all."""

    has_errors: bool = True
    """True: the table has a column of errors."""
    rows: dict[str, BlockRow] = field(default_factory=dict)
    total: BlockRow = field(default_factory=BlockRow)

    def add(
        self, layer: str, attributes: Attributes, norm: float, relative_error: float = 0.0
    ) -> None:
        """Add a layer. `norm`: of its update; `relative_error`: of the update."""
        block = block_of(layer)
        row = self.rows.setdefault(block, BlockRow())
        row.add(attributes, norm, relative_error)
        self.total.add(attributes, norm, relative_error)

    def __str__(self) -> str:
        columns = self._columns()
        header = ["block", "layers", *columns, "|dW|"]
        if self.has_errors:
            header.append("error")
        table = [header]
        rows = [*self.rows.items(), ("all", self.total)]
        for name, row in rows:
            cells = self._cells(name, row, columns)
            table.append(cells)
        lines = align_columns(table, num_left=len(header))
        return "\n".join(lines)

    def _columns(self) -> list[str]:
        """Return the names of all attributes, in the order in which layers had them."""
        columns = []
        for row in self.rows.values():
            for column in row.values:
                if column not in columns:
                    columns.append(column)
        return columns

    def _cells(self, name: str, row: BlockRow, columns: list[str]) -> list[str]:
        """Return the texts of one line."""
        cells = [name, str(row.num_layers)]
        for column in columns:
            values = row.values.get(column, set())
            cells.append(summarize(values))
        cells.append(norm_text(row.norm))
        if self.has_errors:
            cells.append(f"{row.relative_error:.2%}")
        return cells


def block_of(layer: str) -> str:
    """Return the block of a layer: `down_blocks.1.attentions`, `mid_block.resnets`, `conv_in`."""
    words = layer.split(".")
    if len(words) == 1:
        match = FLAT_BLOCK.match(layer)
        return match[0] if match else layer
    num_words = 2
    if words[1].isdigit():
        num_words = 3
    return ".".join(words[:num_words])


def norm_text(norm: float) -> str:
    """Return a norm as text. NaN: the norm depends on the base model, which is not given."""
    return "needs --model" if math.isnan(norm) else f"{norm:.4g}"


def summarize(values: Iterable[object]) -> str:
    """Return `4`, or `2-8` for several numbers, and texts separated by commas."""
    numbers = []
    texts = []
    for value in values:
        if isinstance(value, int | float):
            numbers.append(value)
        elif value != NO_VALUE:
            texts.append(str(value))
    texts.sort()
    if numbers:
        texts.insert(0, number_range(min(numbers), max(numbers)))
    return ", ".join(texts) or NO_VALUE


def number_range(low: float, high: float) -> str:
    """Return a range as text, such as `2-8`, or one number if both ends are equal."""
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def align_columns(rows: list[list[str]], num_left: int = 1) -> list[str]:
    """Return a line per row, with aligned columns: the first `num_left` to the left, the others to
    the right."""
    columns = []
    for index, column in enumerate(zip(*rows, strict=True)):
        width = max(len(cell) for cell in column)
        if index < num_left:
            cells = [cell.ljust(width) for cell in column]
        else:
            cells = [cell.rjust(width) for cell in column]
        columns.append(cells)
    lines = []
    for row in zip(*columns, strict=True):
        line = "  ".join(row)
        lines.append(line.rstrip())
    return lines


def list_facts(facts: Mapping[str, Fact]) -> list[str]:
    """Return a line per fact: its name and its value. Further lines of a value are indented."""
    width = max(map(len, facts), default=0)
    indent = " " * (width + 4)
    lines = []
    for name, fact in facts.items():
        label = name.ljust(width)
        if isinstance(fact, str):
            lines.append(f"{label}  {fact}")
            continue
        first, *further_values = fact
        lines.append(f"{label}  {first}")
        for value in further_values:
            lines.append(indent + value)
    return lines
