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

from dora_dynamics._arrays import RECTANGLE, Array, Rows, library_of, power_of_two

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

RELATIVE_NOISE: Final = 1e-13

__all__ = ["moments", "pearson", "relations", "slope", "spearman"]


def moments(values: Array, used: Array, counts: Array, rows: Rows = RECTANGLE) -> Array:
    """What `relations` takes of many sets of points: all that needs the points themselves.

    Args:
        values: shape (variables, sets, n), or as `rows` say; finite, the first being x; 0 where a
            point does not count.
        used: shape (sets, n): 1 where a point counts, else 0.
        counts: shape (sets,): how many do.
        rows: how the points of the sets lie.

    Returns:
        Shape (8 · variables − 2, sets), on the same device. Each set's numbers are its own, to
        the last bit of numpy's, whatever the others are.
    """
    library = library_of(values)
    some = counts.clip(1.0)
    with np.errstate(all="ignore"):
        largest = rows.largest(values)
        outer = power_of_two(largest)
        deviations = values / rows.spread(outer)
        for _ in range(2):  # again for what rounding left of a large offset
            (total,) = rows.sums(deviations)
            deviations = (deviations - rows.spread(total / some)) * used
        most = rows.largest(deviations)
        inner = power_of_two(most)
        filled = library.where(used == 0, float("inf"), values)  # ranked behind all that count
        ranks = (rows.doubled_ranks(filled) - rows.spread(counts)) * used
        products = [
            *_products(deviations / rows.spread(inner)),
            *_products(ranks),
        ]
        return library.concatenate(
            [
                largest,
                outer,
                most,
                inner,
                *rows.sums(*products),
            ]
        )


def relations(moments: FloatArray, counts: FloatArray, finite: BoolArray) -> FloatArray:
    """What `pearson`, `spearman` and `slope` of many sets of points return.

    Args:
        moments: what the function of that name returned, on the host.
        counts: shape (sets,): how many points count.
        finite: shape (variables, sets): whether all values are finite.

    Returns:
        Shape (3, variables − 1, sets).
    """
    k = len(finite)
    sizes = [k, k, k, k, k - 1, k, k - 1, k]
    largest, outer, most, inner, covariance, square, of_ranks, ranks_square = np.split(
        moments, np.cumsum(sizes)[:-1]
    )
    with np.errstate(all="ignore"):
        varies = most * outer > RELATIVE_NOISE * largest
        exponent = np.frexp(outer)[1] + np.frexp(inner)[1]
        r = covariance / np.sqrt(square[0] * square[1:])
        rho = of_ranks / np.sqrt(ranks_square[0] * ranks_square[1:])
        slope = np.ldexp(covariance / square[0], exponent[1:] - exponent[0])
    defined = finite[0] & finite[1:] & varies[0]
    both = defined & varies[1:] & (counts >= 3)
    found = np.stack([np.clip(r, -1.0, 1.0), np.clip(rho, -1.0, 1.0), slope])
    return np.where(np.stack([both, both, defined]), found, np.nan)


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
    return _relation(x, y)[0]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation of two 1-D arrays; ties get their mean rank.

    Args, returns and raises as `pearson`.
    """
    return _relation(x, y)[1]


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
    return _relation(x, y)[2]


def _relation(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"x and y must be 1-D arrays of one length; got shapes {x.shape} and {y.shape}."
        )
    if len(x) == 0:
        return float("nan"), float("nan"), float("nan")
    values = np.stack([x, y])[:, np.newaxis]
    finite = np.isfinite(values)
    counts = np.full(1, float(len(x)))
    found = moments(np.where(finite, values, 0.0), np.ones((1, len(x))), counts)
    r, rho, slope = relations(found, counts, finite.all(-1))[:, 0, 0].tolist()
    return r, rho, slope


def _products(values: Array) -> tuple[Array, Array]:
    """The product of the first variable with each other, and the squares."""
    return values[0] * values[1:], values * values


def exponent_of(values: FloatArray) -> int:
    """The power of two that bounds |values|."""
    return int(np.frexp(np.max(np.abs(values), initial=0.0))[1])
