"""What the commands share: how a table is printed, for people and for machines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import pandas as pd


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON objects; what is missing or NaN is null."""
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return rows


def print_json(content: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(content, ensure_ascii=False, allow_nan=False))


def interval(value: float, low: float, high: float) -> str:
    """An estimate with its interval: "+0.96 [+0.93, +0.98]"."""
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
