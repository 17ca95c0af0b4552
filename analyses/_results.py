"""Where a recipe leaves what it found: its tables, and beside them what they were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dynamics import provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


def file(out: Path, name: str) -> Path:
    """A file of results, below the folder to write in."""
    return Path(out) / "analyses" / "results" / name


def write_tables(
    out: Path, name: str, tables: Mapping[str, pd.DataFrame], *, digits: int = 5
) -> None:
    """Write tables as CSV, each under the recipe's name and an ending of its own (maybe "")."""
    for ending, table in tables.items():
        target = file(out, f"{name}{ending}.csv")
        target.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(target, index=False, float_format=f"%.{digits}g")


def write_about(out: Path, name: str, about: Mapping[str, object]) -> None:
    """Write what the tables were made with as JSON, with the versions and the machine."""
    made = dict(about) | {"versions": provenance.versions(), "machine": provenance.machine()}
    target = file(out, f"{name}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
