"""Estimates, intervals and p-values for points that share layers and runs.

The numerical half of `statistics`: numpy in, numpy out. A `Panel` holds the points of one group, a
`UnitRows` the values already computed inside each matrix. Both answer the same two questions: what
are the estimates when whole layers and whole runs carry these weights, and how rare is so strong a
relation when the pairing is exchanged. `jackknife` and `bootstrap` need only the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dora_dynamics.correlation import (
    BoolArray,
    FloatArray,
    weighted_pearson,
    weighted_slope,
    weighted_spearman,
    weighted_spread,
)

IntArray: TypeAlias = NDArray[np.intp]
PanelLevel: TypeAlias = Literal["pooled", "within_step", "within_layer"]
Scalar = TypeVar("Scalar", bound=np.generic)

ESTIMATES: Final = ("pearson", "spearman", "slope")
MINIMUM_LAYERS: Final = 4
_CHUNK: Final = 2**21  # elements per temporary array: 16 MiB
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
        x, y, present = self._cells(self.x), self._cells(self.y), self._cells(self.present)
        defined = np.isfinite(weighted_pearson(x, y, present))
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
            Pearson, Spearman and slope, shape (resamples, 3); NaN where no cell is left.
        """
        x, y = self._cells(self.x), self._cells(self.y)
        rows = max(1, _CHUNK // max(1, self.present.size))
        chunks = [
            self._chunk(
                x, y, layer_weights[start : start + rows], run_weights[start : start + rows]
            )
            for start in range(0, len(layer_weights), rows)
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

    def _chunk(
        self, x: FloatArray, y: FloatArray, layer_weights: FloatArray, run_weights: FloatArray
    ) -> FloatArray:
        product = run_weights[:, :, None] * layer_weights[:, None, :]
        weights = self._cells(product[..., None, None] * self.present)
        size = weights.sum(axis=-1)
        scaled = np.ldexp(x, -np.frexp(np.max(np.abs(x), initial=0.0))[1])
        return np.stack(
            [
                _weighted_mean(weighted_pearson(x, y, weights), size),
                _weighted_mean(weighted_spearman(x, y, weights), size),
                _weighted_mean(weighted_slope(x, y, weights), weighted_spread(scaled, weights)),
            ],
            axis=-1,
        )

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
        finite = np.isfinite(self.values)
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


def jackknife(points: Points, confidence: float) -> FloatArray:
    """Two-way jackknife-t interval: whole layers, then whole runs, are left out one at a time.

    The variance is the sum of the jackknife variances over layers and over runs (with one run, over
    layers alone); the quantile is Student's with Satterthwaite's degrees of freedom for that sum.
    Correlations are treated on Fisher's z scale, where their spread hardly depends on their size.

    Args:
        points: What is estimated.
        confidence: Nominal coverage.

    Returns:
        Lower and upper bounds of (pearson, spearman, slope), shape (2, 3); NaN where leaving out
        one layer or run leaves nothing to estimate from, or with fewer than `MINIMUM_LAYERS`.
    """
    layers, runs = points.layers, points.runs
    if layers < MINIMUM_LAYERS:
        return np.full((2, len(ESTIMATES)), np.nan)
    centre = points.estimates(np.ones((1, layers)), np.ones((1, runs)))
    without_layer = points.estimates(1 - np.eye(layers), np.ones((layers, runs)))
    parts, freedoms = [_jackknife_variance(without_layer)], [layers - 1]
    if runs > 1:
        without_run = points.estimates(np.ones((runs, layers)), 1 - np.eye(runs))
        parts.append(_jackknife_variance(without_run))
        freedoms.append(runs - 1)

    shares = np.stack(parts)
    variance = shares.sum(axis=0)
    shares = shares / np.where(variance > 0, variance, 1.0)
    freedom = 1 / np.maximum(
        np.sum(shares**2 / np.array(freedoms)[:, None], axis=0), 1 / sum(freedoms)
    )
    reach = stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance)
    middle = _unbounded(centre)
    low, high = _bounded(middle - reach)[0], _bounded(middle + reach)[0]
    return np.stack([np.minimum(low, centre[0]), np.maximum(high, centre[0])])


def bootstrap(
    points: Points, confidence: float, resamples: int, rng: np.random.Generator
) -> FloatArray:
    """Percentile interval of the two-way bootstrap: whole layers and whole runs are resampled.

    Args:
        points: What is estimated.
        confidence: Nominal coverage.
        resamples: How many times to resample.
        rng: Where the resamples are drawn from.

    Returns:
        Lower and upper bounds of (pearson, spearman, slope), shape (2, 3); NaN with fewer than
        `MINIMUM_LAYERS` layers. Resamples in which an estimate is undefined are left out of it.
    """
    layers, runs = points.layers, points.runs
    bounds = np.full((2, len(ESTIMATES)), np.nan)
    if layers < MINIMUM_LAYERS:
        return bounds
    drawn = points.estimates(
        rng.multinomial(layers, np.full(layers, 1 / layers), size=resamples).astype(np.float64),
        rng.multinomial(runs, np.full(runs, 1 / runs), size=resamples).astype(np.float64),
    )
    for column, values in enumerate(drawn.T):
        finite = values[np.isfinite(values)]
        if finite.size:
            bounds[:, column] = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return bounds


def _jackknife_variance(replicates: FloatArray) -> FloatArray:
    values = _unbounded(replicates)
    n = len(values)
    squares: FloatArray = np.sum((values - values.mean(axis=0)) ** 2, axis=0)
    return (n - 1) / n * squares


def _unbounded(estimates: FloatArray) -> FloatArray:
    """Correlations on Fisher's z scale, kept finite at ±1; slopes as they are."""
    z = np.arctanh(np.clip(estimates[..., :2], -1 + 1e-15, 1 - 1e-15))
    return np.concatenate([z, estimates[..., 2:]], axis=-1)


def _bounded(estimates: FloatArray) -> FloatArray:
    return np.concatenate([np.tanh(estimates[..., :2]), estimates[..., 2:]], axis=-1)


def _weighted_mean(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean along the last axis of the values that are finite; NaN where none is."""
    weights = np.where(np.isfinite(values), weights, 0.0)
    total = weights.sum(axis=-1)
    summed = np.sum(weights * np.where(np.isfinite(values), values, 0.0), axis=-1)
    return np.where(total > 0, summed / np.where(total > 0, total, 1.0), np.nan)


def _permutations(shape: tuple[int, ...], rng: np.random.Generator) -> IntArray:
    """Random permutations of 0..n−1 along the last axis."""
    ordered = np.broadcast_to(np.arange(shape[-1]), shape)
    return rng.permuted(ordered, axis=-1)


def _share_of_hits(observed: float, null: FloatArray) -> float:
    """Share of a null at least as far from 0 as observed, itself counted; rounding aside."""
    hits = int(np.sum(np.abs(null) >= abs(observed) * (1 - 1e-9)))
    return (1 + hits) / (1 + len(null))
