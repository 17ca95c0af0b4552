"""What the commands share: how a table is printed, for people and for machines."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from dora_dynamics.shown_text import in_a_cell, visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON objects, every digit kept; what is missing or NaN is null."""
    rows: list[dict[str, Any]] = table.astype(object).to_dict("records")  # type: ignore[assignment]
    return [{name: _plain(value) for name, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    """A cell as a JSON value: infinite numbers, which JSON has no word for, are null too."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None


def print_json(content: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(content, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """Print text that holds names of a stranger: what would command a terminal is an escape."""
    click.echo(visible(text))


def print_table(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print these columns of some lines, but for those that are empty; numbers to the right."""
    shown = [c for c in columns if any(line[c] not in (None, "") for line in lines)]
    cells = [["" if line[c] is None else in_a_cell(str(line[c])) for c in shown] for line in lines]
    widths = [max(map(len, column)) for column in zip(shown, *cells, strict=True)]
    right = [all(isinstance(line[c], int | None) for line in lines) for c in shown]
    for row in [shown, *cells]:
        aligned = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        click.echo("  ".join(aligned).rstrip())


def interval(value: float, low: float, high: float) -> str:
    """An estimate with its interval: "+0.96 [+0.93, +0.98]"."""
    return f"{number(value)} [{number(low)}, {number(high)}]"


def number(value: float, form: str = "+.2f") -> str:
    """A number in this form, "–" where it is NaN."""
    return "–" if math.isnan(value) else format(value, form)
