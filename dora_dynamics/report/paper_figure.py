"""Section "ΔM against ΔD": the lines and words of the paper's figure, and its markers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dora_dynamics.plotting._style import FINAL_MARKER, INTERMEDIATE_MARKERS
from dora_dynamics.report.words import correlation, correlation_interval, three_digits

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    import pandas as pd

    from dora_dynamics.report.names import Names
    from dora_dynamics.report.recorded import Recorded
    from dora_dynamics.report.series import RunSeries

_BOKEH_MARKERS: Final = {"^": "triangle", "s": "square", "D": "diamond", "o": "circle"}
MARKERS: Final = [_BOKEH_MARKERS[name] for name in (*INTERMEDIATE_MARKERS, FINAL_MARKER)]


@dataclass(frozen=True)
class Fit:
    """The line of one panel of the paper's figure, and what is said of it.

    Attributes:
        x: where the line begins and ends; empty where there is no slope.
        y: the line there.
        r: r with its interval, in words.
        rest: slope and number of points, in words.
    """

    x: list[float]
    y: list[float]
    r: str
    rest: str


def fits(recorded: Recorded, coupling: pd.DataFrame, names: Names) -> list[list[Fit]]:
    """For each role and method, the pooled line of the late checkpoints."""
    pooled = coupling[(coupling["level"] == "pooled") & ~coupling["signed"]]
    found = {(row["role"], row["method"]): row for row in pooled.to_dict("records")}
    late = recorded.late
    usable = late[np.isfinite(late[["delta_direction", "delta_magnitude"]]).all(axis=1)]
    points = dict(iter(usable.groupby(["role", "method"])))
    return [
        [
            _fit(found[role, method], points.get((role, method)))
            if (role, method) in found
            else Fit([], [], "not recorded", "")
            for method in names.methods
        ]
        for role in names.roles
    ]


def _fit(statistic: Mapping[Hashable, Any], points: pd.DataFrame | None) -> Fit:
    r, low, high, slope = (
        float(statistic[name]) for name in ("pearson", "pearson_low", "pearson_high", "slope")
    )
    n = f"n = {int(statistic['n']):,}"
    if points is None or not np.isfinite([r, slope]).all():
        return Fit([], [], "r not defined", n)
    x, y = points["delta_direction"], points["delta_magnitude"]
    ends = np.array([x.min(), x.max()])
    line = y.mean() + slope * (ends - x.mean())
    interval = "no interval"
    if np.isfinite([low, high]).all():
        interval = f"95% {correlation_interval(low, high)}"
    return Fit(
        ends.tolist(),
        line.tolist(),
        f"r = {correlation(r)}, {interval}",
        f"slope {three_digits(slope)}, {n}",
    )


def checkpoint_names(series: Sequence[RunSeries]) -> list[tuple[str, str]]:
    """Legend of the paper's figure: marker and the step it stands for, where runs share it."""
    steps = [one.steps[one.checkpoints] for one in series]
    most = max(len(one) for one in steps)
    found = []
    for place in range(most):
        back = most - place  # the last checkpoint has the last marker in every run
        at = {int(one[-back]) for one in steps if len(one) >= back}
        shared = f"step {at.pop():,}" if len(at) == 1 else ""
        name = "last" if back == 1 else f"{back - 1} before the last"
        found.append((MARKERS[len(MARKERS) - back], shared or name))
    return found
