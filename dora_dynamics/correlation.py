"""Correlation and slope of paired points, in float64.

Nothing here warns or raises on bad numbers: where a statistic is not defined, it is NaN. That is
so with fewer than 3 points (2 for a slope), with a non-finite value among them, and where a
variable does not vary, which includes variation of the size of rounding errors (below 1e-13 of its
largest value, the threshold of `scipy.stats.pearsonr`). Values are centred, then scaled by powers
of two, so that data at 1e-300 or 1e+300 neither underflow nor overflow.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

RELATIVE_NOISE: Final = 1e-13

__all__ = ["pearson", "slope", "spearman"]


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
    return _pearson(x, y) if _correlate(x, y) else float("nan")


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation of two 1-D arrays; ties get their mean rank.

    Args, returns and raises as `pearson`.
    """
    x, y = _pair(x, y)
    return _pearson(_ranks(x), _ranks(y)) if _correlate(x, y) else float("nan")


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
    if not (np.all(np.isfinite(y)) and _varies(x)):
        return float("nan")
    (dx, x_exponent), (dy, y_exponent) = _deviations(x), _deviations(y)
    scaled = np.sum(dx * dy) / np.sum(dx * dx)
    with np.errstate(over="ignore", under="ignore"):
        return float(np.ldexp(scaled, y_exponent - x_exponent))


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"x and y must be 1-D arrays of one length; got shapes {x.shape} and {y.shape}."
        )
    return x, y


def _pearson(x: FloatArray, y: FloatArray) -> float:
    (dx, _), (dy, _) = _deviations(x), _deviations(y)
    r = np.sum(dx * dy) / np.sqrt(np.sum(dx * dx) * np.sum(dy * dy))
    return float(np.clip(r, -1.0, 1.0))


def _correlate(x: FloatArray, y: FloatArray) -> bool:
    """Whether a correlation of these is defined."""
    return len(x) >= 3 and _varies(x) and _varies(y)


def _varies(values: FloatArray) -> bool:
    """Whether values are finite and differ by more than rounding noise."""
    if len(values) < 2 or not np.all(np.isfinite(values)):
        return False
    deviations, exponent = _deviations(values)
    largest = np.ldexp(np.max(np.abs(values)), -exponent)
    return bool(np.max(np.abs(deviations)) > RELATIVE_NOISE * largest)


def _deviations(values: FloatArray) -> tuple[FloatArray, int]:
    """Deviations from the mean, brought into [-1, 1] by a power of two, and its exponent."""
    outer = exponent_of(values)
    values = np.ldexp(values, -outer)
    deviations = values - values.mean()
    deviations -= deviations.mean()  # what rounding left of a large offset
    inner = exponent_of(deviations)
    return np.ldexp(deviations, -inner), outer + inner


def exponent_of(values: FloatArray) -> int:
    """The power of two that bounds |values|."""
    return int(np.frexp(np.max(np.abs(values), initial=0.0))[1])


def _ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1, equal values sharing their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: FloatArray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks
