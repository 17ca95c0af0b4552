"""The measures of one method as functions of how much each layer and each run weighs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from dora_dynamics.diagnosis.measures import LEVELS, MEASURES, Measure, row_measures
from dora_dynamics.statistics import layer_codes, panel

if TYPE_CHECKING:
    from dora_dynamics.correlation import FloatArray
    from dora_dynamics.statistics.cell import IntArray
    from dora_dynamics.statistics.points import Panel

_RULES: Final = ("decay fit", "decay and turning fit", "own radial share", "growth")
COLUMNS: Final[tuple[Measure, ...]] = (*MEASURES, *(Measure(name, "") for name in _RULES))
"""What `Readings.estimates` returns, in this order: the evidence, then what the rules need."""

INDEX: Final = {measure.name: k for k, measure in enumerate(COLUMNS)}


@dataclass(frozen=True)
class Readings:
    """The rows of one method, laid out so that layers and runs can be weighed.

    Attributes:
        rows: the measures that each row has by itself, shape (rows, columns).
        layer: number of each row's layer.
        run: number of each row's run.
        layers: how many layers there are.
        runs: how many runs there are.
        panels: for every role, its points at each level and its mean m_0.
    """

    rows: FloatArray
    layer: IntArray
    run: IntArray
    layers: int
    runs: int
    panels: tuple[tuple[dict[str, Panel], float], ...]

    @classmethod
    def of(cls, frame: pd.DataFrame, layer: IntArray | None = None) -> Readings:
        """Lay out the rows of one method.

        Args:
            frame: rows with finite measures, after step 0.
            layer: number of each row's layer; its own count if None.
        """
        layer = layer_codes(frame) if layer is None else layer
        run = pd.factorize(frame["run"])[0].astype(np.intp)
        values = row_measures(frame)
        rows = np.full((len(frame), len(COLUMNS)), np.nan)
        for name, column in values.items():
            rows[:, INDEX[name]] = column
        panels = []
        for role in frame["role"].unique():
            here = (frame["role"] == role).to_numpy()
            laid_out = panel(
                frame[here],
                ["delta_direction", "delta_magnitude"],
                "pooled",
                layers=layer[here],
                runs=run[here],
            )
            levels = {level: replace(laid_out, level=level) for level in LEVELS}
            panels.append((levels, float(frame.loc[here, "magnitude_before"].mean())))
        return cls(rows, layer, run, int(layer.max()) + 1, int(run.max()) + 1, tuple(panels))

    def estimates(self, layer_weights: FloatArray, run_weights: FloatArray) -> FloatArray:
        """Every measure, on its scale, when a point weighs its layer's weight times its run's.

        Measures of single rows are averaged over the rows; those of levels over the roles.

        Args:
            layer_weights: shape (resamples, layers).
            run_weights: shape (resamples, runs).

        Returns:
            Shape (resamples, len(COLUMNS)); NaN where a measure is undefined.
        """
        total, count = (
            np.einsum("bl,lrk,br->bk", layer_weights, table, run_weights, optimize=True)
            for table in self._sums()
        )
        found = _transformed_means(total, count)
        by_role: dict[str, list[FloatArray]] = {}
        for levels, magnitude in self.panels:
            for level, points in levels.items():
                r, _, slope = points.estimates(layer_weights, run_weights).T
                by_role.setdefault(f"r {level}", []).append(r)
                if level == "within_step":
                    by_role.setdefault(f"slope {level}", []).append(slope / magnitude)
        for name, values in by_role.items():
            k = INDEX[name]
            found[:, k] = _mean(COLUMNS[k].transform(np.stack(values)))
        return found

    def without_each_cell(self) -> FloatArray:
        """The measures of single rows with one layer of one run left out; NaN for the others.

        Returns:
            Shape (layers · runs, len(COLUMNS)).
        """
        sums, counts = (table.reshape(-1, len(COLUMNS)) for table in self._sums())
        return _transformed_means(sums.sum(axis=0) - sums, counts.sum(axis=0) - counts)

    def _sums(self) -> FloatArray:
        """Sums and numbers of the rows' finite measures, shape (2, layers, runs, columns)."""
        finite = np.isfinite(self.rows)
        tables = np.zeros((2, self.layers, self.runs, len(COLUMNS)))
        np.add.at(tables[0], (self.layer, self.run), np.where(finite, self.rows, 0.0))
        np.add.at(tables[1], (self.layer, self.run), finite)
        return tables


def _transformed_means(total: FloatArray, count: FloatArray) -> FloatArray:
    means = np.where(count > 0, total / np.where(count > 0, count, 1.0), np.nan)
    columns = [measure.transform(means[:, k]) for k, measure in enumerate(COLUMNS)]
    return np.stack(columns, axis=1)


def _mean(values: FloatArray) -> FloatArray:
    """Mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    mean: FloatArray = np.where(
        count > 0, np.where(finite, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan
    )
    return mean
