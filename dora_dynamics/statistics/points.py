"""Points that share layers and runs: their estimates under weights, and their p-values.

The numerical half of `statistics`, with `intervals`: numpy in, numpy out. A `Panel` holds the
points of one group, `UnitRows` the values already computed inside each matrix. Both answer the same
two questions: what are the estimates when whole layers and whole runs carry these weights, and how
rare is so strong a relation when the pairing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar

import numpy as np

from dora_dynamics.correlation import exponent_of
from dora_dynamics.statistics.cell import Cell, IntArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dora_dynamics.correlation import BoolArray, FloatArray

PanelLevel: TypeAlias = Literal["pooled", "within_step", "within_layer"]
Scalar = TypeVar("Scalar", bound=np.generic)

ESTIMATES: Final = ("pearson", "spearman", "slope")
_CHUNK: Final = 2**21  # elements per temporary array: 16 MiB
_LARGEST_SLOPE: Final = 1e150  # of which a variance can be taken
_CELL_AXES: Final[dict[PanelLevel, tuple[int, ...]]] = {
    "pooled": (0, 1, 2, 3),
    "within_step": (1, 2),
    "within_layer": (3,),
}


@dataclass(frozen=True)
class Panel:
    """The points of one group, laid out as (run, layer, slot, step).

    A slot is a place inside a layer (a head, a role, an expert), the same in every layer. Points
    that do not exist are absent, and their values are ignored.

    Attributes:
        x: ΔD, shape (runs, layers, slots, steps).
        y: ΔM, same shape.
        present: Where there is a point, same shape.
        level: Which points make a cell, inside which they are correlated.
    """

    x: FloatArray
    y: FloatArray
    present: BoolArray
    level: PanelLevel

    @property
    def runs(self) -> int:
        """Number of runs."""
        return len(self.present)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.present.shape[1])

    @property
    def cells(self) -> int:
        """Number of cells that hold a point."""
        return int(np.sum(np.any(self._cells(self.present), axis=-1)))

    def usable(self) -> Panel:
        """The same panel without the cells that have no correlation, nor what this empties."""
        defined = np.zeros(len(self._cells(self.present)), dtype=np.bool_)
        for k, cell in self._each_cell():
            _, r, *_ = cell.statistics(np.ones((1, len(cell.x))))
            defined[k] = np.isfinite(r[0])
        inside = _CELL_AXES[self.level]
        shape = [1 if axis in inside else n for axis, n in enumerate(self.present.shape)]
        keep = self.present & defined.reshape(shape)
        where = np.ix_(*(np.unique(index) for index in keep.nonzero()))
        return Panel(self.x[where], self.y[where], keep[where], self.level)

    def estimates(self, layer_weights: FloatArray, run_weights: FloatArray) -> FloatArray:
        """Estimates when a point weighs its layer's weight times its run's.

        Correlations are the cells' own, averaged with the weight of their points; the slope is the
        common one of all cells, ΣSxy/ΣSxx. Cells left with too few points are skipped.

        Args:
            layer_weights: Shape (resamples, layers).
            run_weights: Shape (resamples, runs).

        Returns:
            Pearson, Spearman and slope, shape (resamples, 3); NaN where no cell is left, and for a
            slope beyond 1e150.
        """
        rows = max(1, _CHUNK // max(1, self._cells(self.present).shape[-1]))
        chunks = [
            self._chunk(layer_weights[k : k + rows], run_weights[k : k + rows])
            for k in range(0, len(layer_weights), rows)
        ]
        return np.concatenate(chunks)

    def p_value(self, permutations: int, rng: np.random.Generator) -> float:
        """Two-sided permutation p-value of the Pearson correlation.

        The ΔM paths of whole layers are exchanged (`within_step`), or the steps (`within_layer`),
        or both (`pooled`), in all runs alike: a layer or a step keeps much of its nature from run
        to run, and exchanging it in each run on its own would count it once per run. In a ragged
        panel the pairs that an exchange breaks are skipped, and sums compared per root of pairs.

        Args:
            permutations: How many random permutations to draw.
            rng: Where they are drawn from.

        Returns:
            (1 + hits) / (1 + permutations); NaN where there is nothing to exchange.
        """
        _, layers, _, steps = self.present.shape
        exchangeable = {
            "pooled": max(layers, steps),
            "within_step": layers,
            "within_layer": steps,
        }[self.level]
        if exchangeable < 2 or permutations < 1:
            return float("nan")
        x, y, present = self._standard(self.x), self._standard(self.y), self.present.astype(float)
        seed = int(rng.integers(2**63))  # the same exchanges for values and for pairs
        sums, pairs = (
            self._exchanged(a, b, permutations, np.random.default_rng(seed))
            for a, b in ((x, y), (present, present))
        )
        observed = float(np.sum(x * y) / np.sqrt(present.sum()))
        return _share_of_hits(observed, sums / np.sqrt(pairs.clip(min=1)))

    def _cells(self, array: NDArray[Scalar]) -> NDArray[Scalar]:
        """(..., runs, layers, slots, steps) as (..., cells, points)."""
        *lead, runs, layers, slots, steps = array.shape
        if self.level == "pooled":
            return array.reshape(*lead, 1, -1)
        if self.level == "within_layer":
            return array.reshape(*lead, runs * layers * slots, steps)
        return np.moveaxis(array, -1, -3).reshape(*lead, runs * steps, layers * slots)

    def _chunk(self, layer_weights: FloatArray, run_weights: FloatArray) -> FloatArray:
        pearson, spearman, sxx, sxy = np.zeros((4, len(layer_weights)))
        counted = np.zeros((2, len(layer_weights)))
        for _, cell in self._each_cell():
            inner, outer = self._weights(cell, layer_weights, run_weights)
            total, r, rho, cell_sxx, cell_sxy = cell.statistics(inner)
            size = outer * total
            for k, (mean, value) in enumerate(((pearson, r), (spearman, rho))):
                finite = np.isfinite(value)
                mean += size * np.where(finite, value, 0.0)
                counted[k] += size * finite
            sxx += outer * cell_sxx
            sxy += outer * cell_sxy
        sums, over = np.stack([pearson, spearman, sxy]), np.stack([*counted, sxx])
        with np.errstate(over="ignore"):
            ratios = np.where(over > 0, sums / np.where(over > 0, over, 1.0), np.nan)
            ratios[2] = np.ldexp(ratios[2], exponent_of(self.y) - exponent_of(self.x))
        ratios[2, np.abs(ratios[2]) > _LARGEST_SLOPE] = np.nan
        return np.clip(ratios, [[-1.0], [-1.0], [-np.inf]], [[1.0], [1.0], [np.inf]]).T

    def _each_cell(self) -> Iterator[tuple[int, Cell]]:
        x, y = (np.ldexp(values, -exponent_of(values)) for values in (self.x, self.y))
        run, layer = (
            self._cells(np.broadcast_to(index, self.present.shape))
            for index in np.ix_(*map(np.arange, self.present.shape))[:2]
        )
        x, y, present = self._cells(x), self._cells(y), self._cells(self.present)
        for k, where in enumerate(present):
            if where.any():
                yield k, Cell(x[k][where], y[k][where], layer[k][where], run[k][where])

    def _weights(
        self, cell: Cell, layer_weights: FloatArray, run_weights: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Weights of the points inside a cell, and of the cell as a whole."""
        layer, run = layer_weights[:, cell.layer], run_weights[:, cell.run]
        if self.level == "pooled":
            return layer * run, np.ones(len(layer))
        if self.level == "within_step":
            return layer, run[:, 0]
        return np.ones((1, len(cell.x))), layer[:, 0] * run[:, 0]

    def _standard(self, values: FloatArray) -> FloatArray:
        """Values with mean 0 and variance 1 inside each cell; 0 where absent."""
        inside = _CELL_AXES[self.level]
        count = np.sum(self.present, axis=inside, keepdims=True).clip(min=1)

        def centre_and_scale(values: FloatArray) -> FloatArray:
            largest = np.max(np.abs(values), axis=inside, keepdims=True)
            values = np.ldexp(values, -np.frexp(largest)[1])
            mean = np.sum(values, axis=inside, keepdims=True) / count
            return np.where(self.present, values - mean, 0.0)

        deviation = centre_and_scale(centre_and_scale(np.where(self.present, values, 0.0)))
        variance = np.sum(deviation**2, axis=inside, keepdims=True) / count
        return deviation / np.sqrt(np.where(variance > 0, variance, 1.0))

    def _exchanged(
        self, x: FloatArray, y: FloatArray, permutations: int, rng: np.random.Generator
    ) -> FloatArray:
        """Sums of x·y over the points after random exchanges of y, shape (permutations,)."""
        _, layers, slots, steps = x.shape
        if self.level != "pooled":
            within_step = self.level == "within_step"
            pairs = "rcst,rdst->cd" if within_step else "rcst,rcsu->tu"
            products = np.einsum(pairs, x, y, optimize=True)
            draws = _permutations((permutations, len(products)), rng)
            summed: FloatArray = products[np.arange(len(products)), draws].sum(axis=1)
            return summed
        slot = np.arange(slots)[:, None]
        sums = np.empty(permutations)
        rows = max(1, _CHUNK // x.size)
        for start in range(0, permutations, rows):
            k = min(rows, permutations - start)
            layer = _permutations((k, layers), rng)[:, :, None, None]
            step = _permutations((k, steps), rng)[:, None, None, :]
            sums[start : start + k] = np.einsum("rcst,rkcst->k", x, y[:, layer, slot, step])
        return sums


@dataclass(frozen=True)
class UnitRows:
    """Couplings already computed across the units inside each matrix, one row per measurement.

    Attributes:
        values: Pearson, Spearman and slope, shape (rows, 3); a NaN is left out of its column.
        layer: Layer of each row, from 0, shape (rows,).
        run: Run of each row, from 0, shape (rows,).
    """

    values: FloatArray
    layer: IntArray
    run: IntArray

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.layer.max(initial=-1)) + 1

    @property
    def runs(self) -> int:
        """Number of runs."""
        return int(self.run.max(initial=-1)) + 1

    def estimates(self, layer_weights: FloatArray, run_weights: FloatArray) -> FloatArray:
        """Means over the rows when a row weighs its layer's weight times its run's.

        Args:
            layer_weights: Shape (resamples, layers).
            run_weights: Shape (resamples, runs).

        Returns:
            Pearson, Spearman and slope, shape (resamples, 3); NaN where no row is left.
        """
        finite = np.abs(self.values) < _LARGEST_SLOPE  # NaN is not
        sums, counts = np.zeros((2, self.layers, self.runs, len(ESTIMATES)))
        np.add.at(sums, (self.layer, self.run), np.where(finite, self.values, 0.0))
        np.add.at(counts, (self.layer, self.run), finite)
        total, count = (
            np.einsum("bl,lrk,br->bk", layer_weights, table, run_weights, optimize=True)
            for table in (sums, counts)
        )
        return np.where(count > 0, total / np.where(count > 0, count, 1.0), np.nan)

    def p_value(self, permutations: int, rng: np.random.Generator) -> float:
        """Two-sided sign-flip p-value of the mean Pearson correlation, flipping whole layers.

        Args:
            permutations: How many random sets of signs to draw.
            rng: Where they are drawn from.

        Returns:
            (1 + hits) / (1 + permutations); NaN with fewer than 2 layers.
        """
        if self.layers < 2 or permutations < 1:
            return float("nan")
        r = self.values[:, 0]
        totals = np.bincount(self.layer, weights=np.where(np.isfinite(r), r, 0.0))
        signs = rng.choice([-1.0, 1.0], size=(permutations, len(totals)))
        return _share_of_hits(float(totals.sum()), signs @ totals)


Points: TypeAlias = Panel | UnitRows


def _permutations(shape: tuple[int, ...], rng: np.random.Generator) -> IntArray:
    """Random permutations of 0..n−1 along the last axis."""
    ordered = np.broadcast_to(np.arange(shape[-1]), shape)
    return rng.permuted(ordered, axis=-1)


def _share_of_hits(observed: float, null: FloatArray) -> float:
    """Share of a null at least as far from 0 as observed, itself counted; rounding aside."""
    hits = int(np.sum(np.abs(null) >= abs(observed) * (1 - 1e-9)))
    return (1 + hits) / (1 + len(null))
