"""Estimates, intervals and p-values for points that share layers and runs.

The numerical half of `statistics`: numpy in, numpy out. A `Panel` holds the points of one group, a
`UnitRows` the values already computed inside each matrix. Both answer the same two questions: what
are the estimates when whole layers and whole runs carry these weights, and how rare is so strong a
relation when the pairing is exchanged. `bootstrap` and `jackknife` need only the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dora_dynamics.correlation import RELATIVE_NOISE, BoolArray, FloatArray, weighted_pearson

if TYPE_CHECKING:
    from collections.abc import Iterator

IntArray: TypeAlias = NDArray[np.intp]
PanelLevel: TypeAlias = Literal["pooled", "within_step", "within_layer"]
Scalar = TypeVar("Scalar", bound=np.generic)

ESTIMATES: Final = ("pearson", "spearman", "slope")
MINIMUM_LAYERS: Final = 4
_CHUNK: Final = 2**21  # elements per temporary array: 16 MiB
_CACHED: Final = 2**16  # elements per temporary array of which many are live: 512 KiB
_TAIL: Final = 0.1  # share of the resamples beyond either end of the range that gives the spread
_DIFFERENT_LAYERS: Final = 3  # in a resample, as the correlation of 2 points is ±1
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
        for cell in self._each_cell():
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
            ratios[2] = np.ldexp(ratios[2], _exponent(self.y) - _exponent(self.x))
        return np.clip(ratios, [[-1.0], [-1.0], [-np.inf]], [[1.0], [1.0], [np.inf]]).T

    def _each_cell(self) -> Iterator[_Cell]:
        x, y = (np.ldexp(values, -_exponent(values)) for values in (self.x, self.y))
        run, layer = (
            self._cells(np.broadcast_to(index, self.present.shape))
            for index in np.ix_(*map(np.arange, self.present.shape))[:2]
        )
        x, y, present = self._cells(x), self._cells(y), self._cells(self.present)
        for k, where in enumerate(present):
            if where.any():
                yield _Cell(x[k][where], y[k][where], layer[k][where], run[k][where])

    def _weights(
        self, cell: _Cell, layer_weights: FloatArray, run_weights: FloatArray
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
class _Cell:
    """Points that are correlated with one another.

    Attributes:
        x: ΔD, shape (points,), scaled so that its squares neither overflow nor underflow.
        y: ΔM, same shape and also scaled.
        layer: Layer of each point, same shape.
        run: Run of each point, same shape.
    """

    x: FloatArray
    y: FloatArray
    layer: IntArray
    run: IntArray

    def statistics(self, weights: FloatArray) -> FloatArray:
        """Total weight, Pearson, Spearman, Σ(x − x̄)² and Σ(x − x̄)(y − ȳ) under given weights.

        Args:
            weights: Shape (resamples, points).

        Returns:
            Shape (5, resamples). The correlations are NaN, and the sums 0, where undefined.
        """
        x, y = _Ordered.of(self.x), _Ordered.of(self.y)
        rows = max(1, _CACHED // len(self.x))
        return np.concatenate(
            [_statistics(x, y, weights[k : k + rows]) for k in range(0, len(weights), rows)],
            axis=1,
        )


@dataclass(frozen=True)
class _Ordered:
    """A measure over the points of a cell, centred, with what its weighted ranks need.

    Attributes:
        values: Deviations from the mean, shape (points,).
        noise: Root mean square deviation up to which the measure counts as constant.
        order: Points by ascending value.
        inverse: Place of each point in that order.
        first: For each place in that order, the first place of an equal value.
        last: For each place, the last one.
    """

    values: FloatArray
    noise: float
    order: IntArray
    inverse: IntArray
    first: IntArray
    last: IntArray

    @classmethod
    def of(cls, values: FloatArray) -> _Ordered:
        order = np.argsort(values, kind="stable")
        ascending = values[order]
        first = np.searchsorted(ascending, ascending, side="left")
        last = np.searchsorted(ascending, ascending, side="right") - 1
        noise = RELATIVE_NOISE * float(np.max(np.abs(values)))
        centred = values - values.mean()
        return cls(centred - centred.mean(), noise, order, np.argsort(order), first, last)

    def ranks(self, weights: FloatArray) -> FloatArray:
        """Weighted mid-ranks less their mean: the weight below plus half the weight at a value."""
        taken = weights[:, self.order]
        through = np.cumsum(taken, axis=1)
        twice = (through - taken)[:, self.first] + through[:, self.last] - through[:, -1:]
        return 0.5 * twice[:, self.inverse]


def _statistics(x: _Ordered, y: _Ordered, weights: FloatArray) -> FloatArray:
    points = np.count_nonzero(weights, axis=1)
    total = weights.sum(axis=1)
    share = 1 / np.where(total > 0, total, 1.0)
    dx, dy = (v.values - (weights @ v.values * share)[:, None] for v in (x, y))
    sxx, sxy, syy = _products(dx, dy, weights)
    x_varies = (points >= 2) & (sxx > total * x.noise**2)
    y_varies = (points >= 2) & (syy > total * y.noise**2)
    correlated = (points >= 3) & x_varies & y_varies
    rank_xx, rank_xy, rank_yy = _products(x.ranks(weights), y.ranks(weights), weights)
    r, rho = (
        np.where(correlated, xy / np.sqrt(np.where(correlated, xx * yy, 1.0)), np.nan)
        for xx, xy, yy in ((sxx, sxy, syy), (rank_xx, rank_xy, rank_yy))
    )
    return np.stack([total, r, rho, np.where(x_varies, sxx, 0.0), np.where(x_varies, sxy, 0.0)])


def _products(
    dx: FloatArray, dy: FloatArray, weights: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weighted Σdx², Σdx·dy and Σdy² along the last axis."""
    weighted = weights * dx
    return (
        np.vecdot(weighted, dx),
        np.vecdot(weighted, dy),
        np.vecdot(weights * dy, dy),
    )


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


def bootstrap(
    points: Points, confidence: float, resamples: int, rng: np.random.Generator
) -> FloatArray:
    """Two-way bootstrap interval: whole layers and whole runs are drawn again, with replacement.

    A point of a resample weighs the count of its layer times that of its run. The half-width is the
    spread of the estimates over the resamples, times √(n / (n − 1)) (a bootstrap of n things has
    too small a variance by that factor), times Student's quantile for n − 1 degrees of freedom.
    With several runs, n / (n − 1) becomes its mean over layers and runs, weighted by their parts in
    the variance, and the degrees of freedom are Satterthwaite's; the parts come from leaving out
    each layer and each run. Correlations are treated on Fisher's z scale. There, resamples with few
    different layers lie far out, up to infinity where r = ±1: those with fewer than 3 are left out,
    and the spread is that of the normal distribution with the same central 80%.

    Args:
        points: What is estimated.
        confidence: Nominal coverage.
        resamples: How many times to resample.
        rng: Where the resamples are drawn from.

    Returns:
        Lower and upper bounds of (pearson, spearman, slope), shape (2, 3); NaN where leaving out
        one layer or run leaves nothing to estimate from, or with fewer than `MINIMUM_LAYERS`.
        Resamples in which an estimate is undefined are left out of it.
    """
    if points.layers < MINIMUM_LAYERS:
        return np.full((2, len(ESTIMATES)), np.nan)
    layers, runs = (
        rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        for n in (points.layers, points.runs)
    )
    drawn = _unbounded(points.estimates(layers, runs))
    drawn[np.count_nonzero(layers, axis=1) < _DIFFERENT_LAYERS] = np.nan
    defined = np.isfinite(drawn).any(axis=0)
    low, high = np.nanquantile(np.where(defined, drawn, 0.0), [_TAIL, 1 - _TAIL], axis=0)
    spread = np.where(defined, (high - low) / (2 * stats.norm.ppf(1 - _TAIL)), np.nan)

    parts, sizes = _jackknife_variances(points)
    whole = parts.sum(axis=0)
    shrunk = np.sum(parts * ((sizes - 1) / sizes)[:, None], axis=0)
    factor = np.where(shrunk > 0, whole / np.where(shrunk > 0, shrunk, 1.0), 1.0)
    return _student(points, factor * spread**2, _satterthwaite(parts, sizes), confidence)


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
    if points.layers < MINIMUM_LAYERS:
        return np.full((2, len(ESTIMATES)), np.nan)
    parts, sizes = _jackknife_variances(points)
    return _student(points, parts.sum(axis=0), _satterthwaite(parts, sizes), confidence)


def _jackknife_variances(points: Points) -> tuple[FloatArray, IntArray]:
    """Variances from leaving out each layer, then each run where there are several; their numbers.

    Returns:
        Variances on the unbounded scale, shape (1 or 2, 3), and the number of layers and of runs.
    """
    layers, runs = points.layers, points.runs
    left_out = [points.estimates(1 - np.eye(layers), np.ones((layers, runs)))]
    if runs > 1:
        left_out.append(points.estimates(np.ones((runs, layers)), 1 - np.eye(runs)))
    sizes = np.array([len(replicates) for replicates in left_out])
    spreads = np.stack([_unbounded(replicates).var(axis=0) for replicates in left_out])
    return (sizes - 1)[:, None] * spreads, sizes


def _satterthwaite(parts: FloatArray, sizes: IntArray) -> FloatArray:
    """Degrees of freedom of a sum of variances, each from so many things, shape (3,)."""
    whole = parts.sum(axis=0)
    shares = parts / np.where(whole > 0, whole, 1.0)
    inverse = np.sum(shares**2 / (sizes - 1)[:, None], axis=0)
    freedom: FloatArray = 1 / np.maximum(inverse, 1 / np.sum(sizes - 1))
    return freedom


def _student(
    points: Points, variance: FloatArray, freedom: FloatArray, confidence: float
) -> FloatArray:
    """Bounds around the estimates, from variances on the unbounded scale."""
    centre = points.estimates(np.ones((1, points.layers)), np.ones((1, points.runs)))
    reach = stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance)
    middle = _unbounded(centre)
    low, high = _bounded(middle - reach)[0], _bounded(middle + reach)[0]
    return np.stack([np.minimum(low, centre[0]), np.maximum(high, centre[0])])


def _unbounded(estimates: FloatArray) -> FloatArray:
    """Correlations on Fisher's z scale, kept finite at ±1; slopes as they are."""
    z = np.arctanh(np.clip(estimates[..., :2], -1 + 1e-15, 1 - 1e-15))
    return np.concatenate([z, estimates[..., 2:]], axis=-1)


def _bounded(estimates: FloatArray) -> FloatArray:
    return np.concatenate([np.tanh(estimates[..., :2]), estimates[..., 2:]], axis=-1)


def _exponent(values: FloatArray) -> int:
    """The power of two that bounds |values|."""
    return int(np.frexp(np.max(np.abs(values), initial=0.0))[1])


def _permutations(shape: tuple[int, ...], rng: np.random.Generator) -> IntArray:
    """Random permutations of 0..n−1 along the last axis."""
    ordered = np.broadcast_to(np.arange(shape[-1]), shape)
    return rng.permuted(ordered, axis=-1)


def _share_of_hits(observed: float, null: FloatArray) -> float:
    """Share of a null at least as far from 0 as observed, itself counted; rounding aside."""
    hits = int(np.sum(np.abs(null) >= abs(observed) * (1 - 1e-9)))
    return (1 + hits) / (1 + len(null))
