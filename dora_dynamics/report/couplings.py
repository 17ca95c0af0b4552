"""Section "Coupling": correlations and slopes with their intervals, at every level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, get_args

import numpy as np
import pandas as pd

from dora_dynamics.plotting._rows import in_order
from dora_dynamics.report.errors import ReportError
from dora_dynamics.report.words import correlation, three_digits
from dora_dynamics.statistics import Level, coupling

if TYPE_CHECKING:
    from collections.abc import Hashable

    from dora_dynamics.report.recorded import Recorded

LEVELS: Final[dict[Level, str]] = {
    "pooled": "pooled",
    "within_step": "across layers",
    "within_layer": "along a layer's path",
    "units": "across units",
}
assert tuple(LEVELS) == get_args(Level)


@dataclass(frozen=True)
class CouplingLine:
    """One line of the table, in words, and the places of its interval on the axis from −1 to 1."""

    role: str
    method: str
    level: str
    signed: bool
    r: str
    r_interval: str
    rho: str
    rho_interval: str
    slope: str
    slope_interval: str
    p: str
    n: str
    layers: str
    runs: str
    reason: str
    place: float | None
    low: float | None
    high: float | None


def coupling_table(recorded: Recorded) -> pd.DataFrame:
    """Coupling of the late checkpoints at every level, absolute and signed ΔM.

    Raises:
        ReportError: two rows describe the same point.
    """
    try:
        found = [
            coupling(recorded.late, by=["role", "method"], level=level, signed=signed)
            for signed in (False, True)
            for level in LEVELS
        ]
    except ValueError as error:
        raise ReportError(str(error)) from error
    return pd.concat(found, ignore_index=True)


def coupling_lines(table: pd.DataFrame) -> list[CouplingLine]:
    """The lines of the table: absolute before signed, then role, method and level."""
    roles, methods = list(dict.fromkeys(table["role"])), in_order(table["method"])
    levels = list(LEVELS)

    def rank(row: dict[Hashable, object]) -> tuple[int, ...]:
        return (
            int(bool(row["signed"])),
            roles.index(str(row["role"])),
            methods.index(str(row["method"])),
            levels.index(row["level"]),  # type: ignore[arg-type]
        )

    return [_line(row) for row in sorted(table.to_dict("records"), key=rank)]


def _line(row: dict[Hashable, object]) -> CouplingLine:
    def number(name: str) -> float:
        return float(row[name])  # type: ignore[arg-type]

    def place(name: str) -> float | None:
        return number(name) if np.isfinite(number(name)) else None

    def words(name: str) -> str:
        if not np.isfinite(number(name)):
            return "–"
        return three_digits(number(name)) if name.startswith("slope") else correlation(number(name))

    def interval(name: str) -> str:
        ends = f"{name}_low", f"{name}_high"
        if not all(np.isfinite(number(end)) for end in ends):
            return ""
        return f"[{', '.join(words(end) for end in ends)}]"

    p = number("p_value")
    return CouplingLine(
        role=str(row["role"]),
        method=str(row["method"]),
        level=LEVELS[row["level"]],  # type: ignore[index]
        signed=bool(row["signed"]),
        r=words("pearson"),
        r_interval=interval("pearson"),
        rho=words("spearman"),
        rho_interval=interval("spearman"),
        slope=words("slope"),
        slope_interval=interval("slope"),
        p="" if np.isnan(p) else ("< 0.001" if p < 0.001 else f"{p:.2g}"),
        n=f"{row['n']:,}",
        layers=f"{row['layers']:,}",
        runs=f"{row['runs']:,}",
        reason=str(row["reason"]),
        place=place("pearson"),
        low=place("pearson_low"),
        high=place("pearson_high"),
    )
