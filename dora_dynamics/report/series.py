"""The rows of a trajectory as matrices: a line per weight (or head) of a run, a column per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dora_dynamics.plotting._rows import in_order
from dora_dynamics.report.errors import ReportError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from dora_dynamics.report.recorded import Recorded

MEASURES: Final = {
    "delta_magnitude": "ΔM",
    "delta_direction": "ΔD",
    "signed_delta_magnitude": "signed ΔM",
    "relative_delta_magnitude": "ΔM / m₀",
    "radial_share": "radial share of the update",
    "unit_coupling": "r across units",
    "unit_slope": "slope across units",
}
"""Columns the page carries, and what it calls them."""

MOST_VALUES: Final = 750_000
"""Numbers a page carries, so that it stays below 6 MB; of longer runs, steps are left out."""

_ANY_SIZE: Final = 1_000_000
_SPARSEST: Final = 20
"""Cells of a run's matrix for each of its rows, at most: the matrix is as large as these."""


@dataclass(frozen=True)
class RunSeries:
    """The lines of one run.

    Attributes:
        run: its name.
        method: its method.
        keys: one row a line: site, layer, stack, role, head.
        steps: the steps of the columns.
        recorded: how many steps the run has; more than `steps` where some were left out.
        checkpoints: which columns are the four late checkpoints.
        values: a matrix (lines, steps) for each of `MEASURES`; NaN where there is none.
    """

    run: str
    method: str
    keys: pd.DataFrame
    steps: NDArray[np.int64]
    recorded: int
    checkpoints: NDArray[np.int64]
    values: dict[str, NDArray[np.float32]]


def lay_out(recorded: Recorded, most_values: int | None = MOST_VALUES) -> list[RunSeries]:
    """The series of every run; methods in the paper's order, then as they first appear."""
    numbers = len(recorded.table) * len(MEASURES)
    share = 1.0 if most_values is None else min(1.0, most_values / numbers)
    late = recorded.late.groupby("run")["step"].unique()
    groups = dict(iter(recorded.table.groupby("run", sort=False)))
    methods = in_order(recorded.table["method"])
    found = [
        _run(str(name), rows, np.sort(np.asarray(late.get(name, []), dtype=np.int64)), share)
        for name, rows in groups.items()
    ]
    return sorted(found, key=lambda one: methods.index(one.method))


def _run(name: str, rows: pd.DataFrame, late: NDArray[np.int64], share: float) -> RunSeries:
    place = ["site", "layer", "stack", "role", "head"]
    line = rows.groupby(place, sort=False, dropna=False).ngroup().to_numpy()
    keys = rows[place].iloc[np.unique(line, return_index=True)[1]].reset_index(drop=True)
    steps, column = np.unique(rows["step"].to_numpy(dtype=np.int64), return_inverse=True)
    if len(keys) * len(steps) > max(_ANY_SIZE, _SPARSEST * len(rows)):
        raise ReportError(
            f"the {len(rows):,} rows of {name} are of {len(keys):,} weights and {len(steps):,} "
            "steps, hardly two of them of one weight: that is no recorded run."
        )
    kept = _kept(steps, late, share)
    values = {}
    for measure in MEASURES:
        matrix = np.full((len(keys), len(steps)), np.nan, dtype=np.float32)
        with np.errstate(over="ignore"):
            matrix[line, column] = rows[measure].to_numpy(dtype=np.float64)
        values[measure] = matrix[:, kept]
    return RunSeries(
        run=name,
        method=str(rows["method"].iloc[0]),
        keys=keys,
        steps=steps[kept],
        recorded=len(steps),
        checkpoints=np.searchsorted(steps[kept], late),
        values=values,
    )


def _kept(steps: NDArray[np.int64], late: NDArray[np.int64], share: float) -> NDArray[np.intp]:
    """Which steps stay: evenly spread ones, the first, the last and the checkpoints among them."""
    if share >= 1:
        return np.arange(len(steps))
    spread = np.linspace(0, len(steps) - 1, max(2, int(share * len(steps)))).round()
    return np.union1d(spread.astype(np.intp), np.searchsorted(steps, late))
