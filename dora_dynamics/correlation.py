"""Correlation and slope of paired points, plain and weighted, on float64 arrays.

The plain functions take one pair of 1-D arrays and return a float. The weighted ones work along the
last axis and broadcast over the axes before it, so that one call evaluates every resample of a
bootstrap: `x` and `y` of shape (n,) with weights of shape (resamples, n) give (resamples,). A point
of weight k counts as k copies of it; a point of weight 0 is absent, whatever it holds.

Nothing here warns or raises on bad numbers: where a statistic is not defined, it is NaN. That is
so with fewer than 3 points of positive weight (2 for a slope), with a non-finite value among them,
and where a variable does not vary, which includes variation of the size of rounding errors (below
1e-13 of its largest value, the threshold of `scipy.stats.pearsonr`). Values are centred, then
scaled by powers of two, so that data at 1e-300 or 1e+300 neither underflow nor overflow.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

RELATIVE_NOISE: Final = 1e-13

__all__ = [
    "pearson",
    "slope",
    "spearman",
    "weighted_pearson",
    "weighted_ranks",
    "weighted_slope",
    "weighted_spearman",
    "weighted_spread",
]


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson correlation of two 1-D arrays.

    Args:
        x: n values.
        y: n values.

    Returns:
        r in [-1, 1]; NaN with fewer than 3 points, a non-finite value, or no variation.

    Raises:
        ValueError: If the arrays are not 1-D and of one length.
    """
    x, y = _pair(x, y)
    return float(weighted_pearson(x, y, np.ones_like(x)))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation of two 1-D arrays; ties get their mean rank.

    Args:
        x: n values.
        y: n values.

    Returns:
        ρ in [-1, 1]; NaN with fewer than 3 points, a non-finite value, or no variation.

    Raises:
        ValueError: If the arrays are not 1-D and of one length.
    """
    x, y = _pair(x, y)
    return float(weighted_spearman(x, y, np.ones_like(x)))


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Least-squares slope of `y` on `x`, with an intercept.

    Args:
        x: n values.
        y: n values.

    Returns:
        The slope, in units of y per unit of x; NaN with fewer than 2 points, a non-finite value,
        or an `x` that does not vary. A constant `y` has slope 0.

    Raises:
        ValueError: If the arrays are not 1-D and of one length.
    """
    x, y = _pair(x, y)
    return float(weighted_slope(x, y, np.ones_like(x)))


def weighted_pearson(x: ArrayLike, y: ArrayLike, weights: ArrayLike) -> FloatArray:
    """Weighted Pearson correlation along the last axis.

    Args:
        x: Values, shape (..., n).
        y: Values, shape (..., n).
        weights: Non-negative weights, shape (..., n); only their ratios matter.

    Returns:
        r in [-1, 1], of the broadcast shape without its last axis; NaN where undefined.
    """
    x, y, weights, defined = _prepare(x, y, weights, minimum=3)
    dx, _, x_varies = _standard(x, weights)
    dy, _, y_varies = _standard(y, weights)
    covariance = np.sum(weights * dx * dy, axis=-1)
    variances = np.sum(weights * dx * dx, axis=-1) * np.sum(weights * dy * dy, axis=-1)
    defined &= x_varies & y_varies & (variances > 0)
    r = covariance / np.sqrt(np.where(defined, variances, 1.0))
    return np.where(defined, np.clip(r, -1.0, 1.0), np.nan)


def weighted_spearman(x: ArrayLike, y: ArrayLike, weights: ArrayLike) -> FloatArray:
    """Weighted Spearman correlation along the last axis: Pearson's of the weighted mid-ranks.

    Args:
        x: Values, shape (..., n).
        y: Values, shape (..., n).
        weights: Non-negative weights, shape (..., n); only their ratios matter.

    Returns:
        ρ in [-1, 1], of the broadcast shape without its last axis; NaN where undefined.
    """
    x, y, weights = _arrays(x, y, weights)
    *_, defined = _prepare(x, y, weights, minimum=3)
    defined &= _varies(x, weights) & _varies(y, weights)
    rho = weighted_pearson(weighted_ranks(x, weights), weighted_ranks(y, weights), weights)
    return np.where(defined, rho, np.nan)


def weighted_slope(x: ArrayLike, y: ArrayLike, weights: ArrayLike) -> FloatArray:
    """Weighted least-squares slope of `y` on `x`, with an intercept, along the last axis.

    Args:
        x: Values, shape (..., n).
        y: Values, shape (..., n).
        weights: Non-negative weights, shape (..., n); only their ratios matter.

    Returns:
        Slopes, of the broadcast shape without its last axis; NaN where undefined.
    """
    x, y, weights, defined = _prepare(x, y, weights, minimum=2)
    dx, x_exponent, x_varies = _standard(x, weights)
    dy, y_exponent, _ = _standard(y, weights)
    variance = np.sum(weights * dx * dx, axis=-1)
    defined &= x_varies & (variance > 0)
    scaled = np.sum(weights * dx * dy, axis=-1) / np.where(defined, variance, 1.0)
    with np.errstate(over="ignore", under="ignore"):
        return np.where(defined, np.ldexp(scaled, y_exponent - x_exponent), np.nan)


def weighted_spread(x: ArrayLike, weights: ArrayLike) -> FloatArray:
    """Weighted sum of squared deviations from the weighted mean, Σ w (x − x̄)², on the last axis.

    Unlike the correlations it is an absolute size, so it underflows to 0 for deviations below
    about 1e-162: scale the data first where that matters.

    Args:
        x: Values, shape (..., n).
        weights: Non-negative weights, shape (..., n).

    Returns:
        Sums, of the broadcast shape without its last axis; NaN where a value of positive weight is
        not finite.
    """
    x, _, weights = _arrays(x, 0.0, weights)
    finite = np.all(np.isfinite(x) | (weights == 0), axis=-1)
    x = np.where((weights > 0) & np.isfinite(x), x, 0.0)
    deviation = x - _mean(x, weights)
    return np.where(finite, np.sum(weights * deviation * deviation, axis=-1), np.nan)


def weighted_ranks(x: ArrayLike, weights: ArrayLike) -> FloatArray:
    """Weighted mid-ranks along the last axis.

    The rank of a value is the weight below it plus half the weight at it. With weights of one this
    is the usual mean rank less one half; only differences of ranks matter to a correlation.

    Args:
        x: Values, shape (..., n); equal values are tied.
        weights: Non-negative weights, shape (..., n).

    Returns:
        Ranks, of the broadcast shape.
    """
    x, _, weights = _arrays(x, 0.0, weights)
    order = np.argsort(x, axis=-1, kind="stable")
    ascending = np.take_along_axis(x, order, axis=-1)
    first, last = _tie_bounds(ascending)

    shape = np.broadcast_shapes(x.shape, weights.shape)
    weights = np.broadcast_to(weights, shape)
    taken = np.take_along_axis(weights, np.broadcast_to(order, shape), axis=-1)
    through = np.cumsum(taken, axis=-1)
    below = np.take_along_axis(through - taken, np.broadcast_to(first, shape), axis=-1)
    upto = np.take_along_axis(through, np.broadcast_to(last, shape), axis=-1)
    inverse = np.broadcast_to(np.argsort(order, axis=-1, kind="stable"), shape)
    return np.take_along_axis((below + upto) / 2, inverse, axis=-1)


def _tie_bounds(ascending: FloatArray) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First and last position of the run of equal values that each position belongs to."""
    n = ascending.shape[-1]
    position = np.broadcast_to(np.arange(n), ascending.shape)
    step = ascending[..., 1:] != ascending[..., :-1]
    edge = np.ones((*ascending.shape[:-1], 1), dtype=np.bool_)
    starts = np.concatenate([edge, step], axis=-1)
    ends = np.concatenate([step, edge], axis=-1)
    first = np.maximum.accumulate(np.where(starts, position, 0), axis=-1)
    backwards = np.where(ends, position, n - 1)[..., ::-1]
    return first, np.minimum.accumulate(backwards, axis=-1)[..., ::-1]


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"x and y must be 1-D arrays of one length; got shapes {x.shape} and {y.shape}."
        )
    return x, y


def _arrays(
    x: ArrayLike, y: ArrayLike, weights: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    return (
        np.asarray(x, dtype=np.float64),
        np.asarray(y, dtype=np.float64),
        np.asarray(weights, dtype=np.float64),
    )


def _prepare(
    x: ArrayLike, y: ArrayLike, weights: ArrayLike, *, minimum: int
) -> tuple[FloatArray, FloatArray, FloatArray, BoolArray]:
    """Arrays with absent and non-finite values set to 0, and where there are points enough."""
    x, y, weights = _arrays(x, y, weights)
    present = weights > 0
    finite = np.isfinite(x) & np.isfinite(y)
    defined = np.all(finite | ~present, axis=-1) & (np.sum(present, axis=-1) >= minimum)
    keep = present & finite
    return np.where(keep, x, 0.0), np.where(keep, y, 0.0), weights, defined


def _mean(x: FloatArray, weights: FloatArray) -> FloatArray:
    """Weighted mean along the last axis, which is kept; of nothing, 0."""
    total = np.sum(weights, axis=-1, keepdims=True)
    share = weights / np.where(total > 0, total, 1.0)
    mean: FloatArray = np.sum(share * x, axis=-1, keepdims=True)
    return mean


def _exponent(x: FloatArray) -> NDArray[np.int32]:
    """The power of two that bounds |x| along the last axis, which is kept."""
    largest: FloatArray = np.max(np.abs(x), axis=-1, keepdims=True, initial=0.0)
    return np.frexp(largest)[1]


def _varies(x: FloatArray, weights: FloatArray) -> BoolArray:
    keep = (weights > 0) & np.isfinite(x)
    return _standard(np.where(keep, x, 0.0), weights)[2]


def _standard(
    x: FloatArray, weights: FloatArray
) -> tuple[FloatArray, NDArray[np.int32], BoolArray]:
    """Centre at the weighted mean and bring into [-1, 1] by a power of two.

    Returns:
        The standard values (0 where the weight is 0), the exponent taken out, and whether x varies
        by more than rounding noise.
    """
    outer = _exponent(x)
    x = np.ldexp(x, -outer)
    deviation = x - _mean(x, weights)
    deviation = deviation - _mean(deviation, weights)  # what rounding left of a large offset
    deviation = np.where(weights > 0, deviation, 0.0)
    largest = np.max(np.abs(x), axis=-1, initial=0.0)
    varies = np.max(np.abs(deviation), axis=-1, initial=0.0) > RELATIVE_NOISE * largest
    inner = _exponent(deviation)
    return np.ldexp(deviation, -inner), (outer + inner)[..., 0], varies
