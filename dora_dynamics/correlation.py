"""Correlation and slope of paired points, in float64.

Nothing here warns or raises on bad numbers: where a statistic is not defined, it is NaN. That is
so with fewer than 3 points (2 for a slope), with a non-finite value among them, and where a
variable does not vary, which includes variation of the size of rounding errors (below 1e-13 of its
largest value, the threshold of `scipy.stats.pearsonr`). Values are centred, then scaled by powers
of two, so that data at 1e-300 or 1e+300 neither underflow nor overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

RELATIVE_NOISE: Final = 1e-13

__all__ = ["Relation", "pearson", "relations", "slope", "spearman"]


@dataclass(frozen=True)
class Relation:
    """How y goes with x: what `pearson`, `spearman` and `slope` of them return."""

    pearson: float
    spearman: float
    slope: float


def relations(x: ArrayLike, ys: Sequence[ArrayLike]) -> list[Relation]:
    """The relation of each of several variables to `x`; what they share is computed once.

    Args:
        x: n values.
        ys: n values each.

    Raises:
        ValueError: If the arrays are not 1-D and of one length.
    """
    pairs = [_pair(x, y) for y in ys]
    one = _standard(np.asarray(x, dtype=np.float64))
    return [_relation(one, _standard(y)) for _, y in pairs]


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
    return relations(x, [y])[0].pearson


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman rank correlation of two 1-D arrays; ties get their mean rank.

    Args, returns and raises as `pearson`.
    """
    return relations(x, [y])[0].spearman


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
    return relations(x, [y])[0].slope


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"x and y must be 1-D arrays of one length; got shapes {x.shape} and {y.shape}."
        )
    return x, y


@dataclass(frozen=True)
class _Standard:
    """Values as `_relation` needs them.

    Attributes:
        deviations: from the mean, brought into [-1, 1] by 2^-exponent; None if not all are finite.
        exponent: the power of two taken out.
        ranks: less their mean; None where values do not differ by more than rounding noise.
    """

    deviations: FloatArray | None = None
    exponent: int = 0
    ranks: FloatArray | None = None


def _standard(values: FloatArray) -> _Standard:
    if len(values) < 2 or not np.isfinite(values).all():
        return _Standard()
    deviations, exponent = _deviations(values)
    largest = np.ldexp(np.abs(values).max(), -exponent)
    varies = np.abs(deviations).max() > RELATIVE_NOISE * largest
    return _Standard(deviations, exponent, _ranks(values) if varies else None)


def _relation(x: _Standard, y: _Standard) -> Relation:
    nan = float("nan")
    if x.deviations is None or y.deviations is None or x.ranks is None:
        return Relation(nan, nan, nan)
    covariance = float(x.deviations @ y.deviations)
    square = float(x.deviations @ x.deviations)
    with np.errstate(over="ignore", under="ignore"):
        slope = float(np.ldexp(covariance / square, y.exponent - x.exponent))
    if y.ranks is None or len(y.ranks) < 3:
        return Relation(nan, nan, slope)
    r = covariance / np.sqrt(square * float(y.deviations @ y.deviations))
    squares = float(x.ranks @ x.ranks) * float(y.ranks @ y.ranks)
    rho = float(x.ranks @ y.ranks) / np.sqrt(squares)
    return Relation(float(np.clip(r, -1.0, 1.0)), float(np.clip(rho, -1.0, 1.0)), slope)


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
    """Ranks less their mean, equal values sharing their mean rank."""
    order = np.argsort(values)
    ascending = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    ranks = np.empty(len(values))
    if len(starts) == len(values):
        ranks[order] = np.arange(len(values))
    else:
        counts = np.diff(starts, append=len(values))
        ranks[order] = np.repeat(starts + (counts - 1) / 2, counts)
    ranks -= (len(values) - 1) / 2
    return ranks
