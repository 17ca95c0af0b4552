"""`trajectory.csv`: how a row stands in it, and how strictly it is read.

A number is the shortest text that reads back equal, and nothing where it is missing. A text that a
spreadsheet would take for a formula (it begins with `=`, `+`, `-`, `@`, a tab or a line feed, and
names come from strangers) is written with an apostrophe before it, which reading takes off again.
"""

from __future__ import annotations

import csv
import io
import math
import re
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import pandas as pd

from dora_dynamics.trajectory import COLUMN_NAMES, COLUMNS, TrajectoryError, validate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

TRAJECTORY_FILE: Final = "trajectory.csv"

_LINE_LIMIT: Final = 1 << 20
"""Bytes of the longest line."""
_LONGEST_TEXT: Final = 10_000
"""Characters of a name: of a run, a module, …"""
_AT_A_TIME: Final = 20_000
"""Rows that are text in memory together while a table is read."""
_LARGEST_INTEGER: Final = 2**53
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf|nan", re.ASCII)
_FORMULA: Final = re.compile(r"'*[=+\-@\t\r]")
_IS_TEXT: Final = tuple(column.kind == "text" for column in COLUMNS)
_in_order: Final = itemgetter(*COLUMN_NAMES)

_NEVER_NEGATIVE: Final = frozenset(
    {
        "step",
        "layer",
        "head",
        "units",
        "delta_magnitude",
        "delta_direction",
        "relative_delta_magnitude",
        "magnitude_before",
        "update_norm",
        "radial_share",
        "zero_units",
        "non_finite",
    }
)
_AT_MOST: Final = {
    "delta_direction": 2.0,
    "radial_share": 1.0,
    "unit_coupling": 1.0,
    "unit_rank_coupling": 1.0,
    "signed_unit_coupling": 1.0,
    "signed_unit_rank_coupling": 1.0,
}
_ROUNDING: Final = 1e-9


def header() -> bytes:
    """The first line of a table."""
    return ",".join(COLUMN_NAMES).encode() + b"\n"


def formatted(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Rows as lines of the table."""
    lines = [
        ",".join(
            [
                repr(value) if type(value) is float and value == value else _cell(value, is_text)
                for value, is_text in zip(_in_order(row), _IS_TEXT, strict=True)
            ]
        )
        for row in rows
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def parsed(stream: BinaryIO) -> pd.DataFrame:
    """The table in a stream, numbers read exactly as they were written.

    A last line without its line end (the run was killed while writing it) is left out.

    Raises:
        TrajectoryError: a column is missing or holds what it cannot hold.
        ValueError, csv.Error: it is no table.
    """
    reader = csv.reader(complete_lines(stream), strict=True)
    names = next(reader, None)
    if names is None:
        raise ValueError("it is empty")
    converters = _converters(names)
    parts: list[pd.DataFrame] = []
    columns: list[list[Any]] = [[] for _ in names]
    for count, row in enumerate(reader, 1):
        if len(row) != len(names):
            raise ValueError(
                f"line {reader.line_num} has {len(row)} fields where the header has {len(names)}"
            )
        for convert, values, text in zip(converters, columns, row, strict=True):
            values.append(convert(text))
        if count % _AT_A_TIME == 0:
            parts.append(_part(names, columns))
            columns = [[] for _ in names]
    parts.append(_part(names, columns))
    filled = [part for part in parts if len(part)] or parts[:1]
    return filled[0] if len(filled) == 1 else pd.concat(filled, ignore_index=True)


def refuse_repeated(table: pd.DataFrame) -> None:
    """Refuse two rows of one weight at one step, which would count twice in every statistic.

    Raises:
        TrajectoryError: there are such rows.
    """
    repeated = table.duplicated(["run", "method", "step", "site", "role", "head"])
    if repeated.any():
        row = table[repeated].iloc[0]
        raise TrajectoryError(
            f"two rows are of {row['site'][:80]!r} at step {row['step']}: keep the one that was "
            "measured."
        )


def complete_lines(stream: BinaryIO) -> Iterator[str]:
    """The lines of a stream that have their line end.

    Raises:
        ValueError: a line is longer than any can be, or no text.
    """
    while line := stream.readline(_LINE_LIMIT):
        if not line.endswith(b"\n"):
            if len(line) == _LINE_LIMIT:
                raise ValueError(f"it has a line of more than {_LINE_LIMIT} bytes")
            return
        yield line.decode("utf-8")


def _part(names: list[str], columns: list[list[Any]]) -> pd.DataFrame:
    """Some rows as a table of the right types; columns are given by place, so none is lost."""
    known = frozenset(COLUMN_NAMES)
    series = [
        pd.Series(values, dtype=object if name in known else str)
        for name, values in zip(names, columns, strict=True)
    ]
    table = pd.concat(series, axis=1, keys=range(len(names)))
    table.columns = pd.Index(names)
    return validate(table)


def _converters(names: list[str]) -> list[Callable[[str], object]]:
    """What makes a value of the text of each column."""
    kinds = {column.name: column.kind for column in COLUMNS}
    seen: dict[str, str] = {}

    def text(value: str) -> str:
        if len(value) > _LONGEST_TEXT:
            raise TrajectoryError(f"a text of {len(value):,} characters is no name.")
        value = value[1:] if value.startswith("'") and _FORMULA.match(value) else value
        return seen.setdefault(value, value)  # names come again in every row

    def same(value: str) -> str:
        return seen.setdefault(value, value)

    def number_of(name: str) -> Callable[[str], float]:
        lowest = 0.0 if name in _NEVER_NEGATIVE else -math.inf
        highest = _AT_MOST.get(name, math.inf)
        if name in _AT_MOST and lowest < 0:
            lowest = -highest
        if kinds[name] == "integer":
            highest = float(_LARGEST_INTEGER)

        def number(value: str) -> float:
            if not value:
                return math.nan
            if not _NUMBER.fullmatch(value):
                raise TrajectoryError(f"column {name!r} must hold numbers, not {value[:80]!r}.")
            result = float(value)
            if result < lowest - _ROUNDING or (result > highest + _ROUNDING):
                raise TrajectoryError(f"column {name!r} cannot hold {value[:80]}.")
            return result

        return number

    return [
        same if name not in kinds else text if kinds[name] == "text" else number_of(name)
        for name in names
    ]


def _cell(value: object, is_text: bool) -> str:
    """A value as it stands in the file."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if is_text:
        return _text_cell(str(value))
    return repr(float(value)) if isinstance(value, float) else str(value)


@lru_cache(maxsize=4096)
def _text_cell(text: str) -> str:
    """A name, which comes again at every step; quoted where csv quotes it among others."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(
        [f"'{text}" if _FORMULA.match(text) else text, ""]
    )
    return buffer.getvalue().removesuffix(",\n")
