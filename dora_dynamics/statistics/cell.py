"""The statistics of points that are correlated with one another, under many sets of weights.

A point of weight k counts as k copies of it; a point of weight 0 is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dora_dynamics.correlation import RELATIVE_NOISE, FloatArray

IntArray: TypeAlias = NDArray[np.intp]

_CACHED: Final = 2**16  # elements per temporary array of which many are live: 512 KiB


@dataclass(frozen=True)
class Cell:
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
