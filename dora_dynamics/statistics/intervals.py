"""Intervals of estimates from points that share layers and runs: bootstrap and jackknife."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import stats

from dora_dynamics.statistics.points import ESTIMATES

if TYPE_CHECKING:
    from dora_dynamics.correlation import FloatArray
    from dora_dynamics.statistics.cell import IntArray
    from dora_dynamics.statistics.points import Points

MINIMUM_LAYERS: Final = 4
_TAIL: Final = 0.1  # share of the resamples beyond either end of the range that gives the spread
_DIFFERENT_LAYERS: Final = 3  # in a resample, as the correlation of 2 points is ±1


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
