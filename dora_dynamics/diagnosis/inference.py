"""Intervals and p-values of what is computed from the readings of one method or several.

Whole layers and whole runs are drawn again, as in `dora_dynamics.coupling`; layers that two methods
share are drawn for both at once, so that what differs from layer to layer cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dora_dynamics.correlation import FloatArray
    from dora_dynamics.diagnosis.readings import Readings

_TAIL: Final = 0.1  # share of the resamples beyond either end of the range that gives the spread
_DIFFERENT_LAYERS: Final = 3  # in a resample, as the correlation of 2 points is ±1


@dataclass(frozen=True)
class Replicates:
    """Estimates of one method: as they are, over resamples, and with one thing left out.

    Attributes:
        centre: shape (measures,).
        drawn: shape (resamples, measures).
        left_out: for every kind of thing that was drawn, shape (things, measures).
        cells: with one layer of one run left out, shape (cells, measures); NaN for measures that
            are not means over rows.
    """

    centre: FloatArray
    drawn: FloatArray
    left_out: dict[str, FloatArray]
    cells: FloatArray


@dataclass(frozen=True)
class Inference:
    """Estimates with standard errors and Student's degrees of freedom, each of one shape."""

    centre: FloatArray
    error: FloatArray
    freedom: FloatArray

    def interval(self, confidence: float) -> tuple[FloatArray, FloatArray]:
        """Lower and upper bounds."""
        reach = stats.t.ppf((1 + confidence) / 2, self.freedom) * self.error
        return self.centre - reach, self.centre + reach

    def above(self, bound: float) -> FloatArray:
        """One-sided p-value of "at most `bound`", small where the estimate is clearly above."""
        return _tail((self.centre - bound) / self.error, self.freedom)

    def below(self, bound: float) -> FloatArray:
        """One-sided p-value of "at least `bound`"."""
        return _tail((bound - self.centre) / self.error, self.freedom)

    def beyond(self, margin: FloatArray | float) -> FloatArray:
        """p-value of "within ±`margin`", for the worst case of it (a minimum-effect test)."""
        size = np.abs(self.centre)
        return _tail((size - margin) / self.error, self.freedom) + _tail(
            (size + margin) / self.error, self.freedom
        )


def _tail(t: FloatArray, freedom: FloatArray) -> FloatArray:
    return np.asarray(stats.t.sf(t, freedom), dtype=np.float64)


def replicate(
    methods: Mapping[str, Readings], shared_layers: bool, resamples: int, rng: np.random.Generator
) -> dict[str, Replicates]:
    """Resamples of several methods.

    A method of one run says nothing about how runs differ. Where another method has several, its
    runs stand in: the estimate is taken to vary from run to run as much as there.

    Args:
        methods: the readings of each.
        shared_layers: whether layers of one number are the same weights in all methods.
        resamples: how many.
        rng: where they are drawn from.

    Returns:
        For every method its replicates, the same in whatever order the methods are given; what
        belongs to `layers` is shared where the layers are.
    """
    methods = dict(sorted(methods.items()))
    found = {}
    common = max(readings.layers for readings in methods.values())
    shared = _drawn(common, resamples, rng) if shared_layers else None
    for name, readings in methods.items():
        layers, runs = readings.layers, readings.runs
        layer_weights = _drawn(layers, resamples, rng) if shared is None else shared
        total = layer_weights.shape[1]
        all_layers, all_runs = np.ones((1, total)), np.ones((1, runs))
        weights = {
            "centre": (all_layers, all_runs),
            "drawn": (layer_weights, _drawn(runs, resamples, rng)),
            "layers" if shared_layers else f"layers of {name}": (1 - np.eye(total), all_runs),
        }
        if runs > 1:
            weights[f"runs of {name}"] = (all_layers, 1 - np.eye(runs))
        estimates = _estimated(readings, weights)
        centre, drawn = estimates.pop("centre")[0], estimates.pop("drawn")
        drawn[np.count_nonzero(layer_weights, axis=1) < _DIFFERENT_LAYERS] = np.nan
        found[name] = Replicates(centre, drawn, estimates, readings.without_each_cell())
    return {
        name: _with_borrowed_runs(name, found, methods, rng) if readings.runs == 1 else found[name]
        for name, readings in methods.items()
    }


def _estimated(
    readings: Readings, weights: Mapping[str, tuple[FloatArray, FloatArray]]
) -> dict[str, FloatArray]:
    """The estimates under several sets of layer and run weights, in one pass over the points."""
    sizes = [max(len(layer), len(run)) for layer, run in weights.values()]
    layer_weights = np.concatenate(
        [
            np.broadcast_to(layer[:, : readings.layers], (size, readings.layers))
            for (layer, _), size in zip(weights.values(), sizes, strict=True)
        ]
    )
    run_weights = np.concatenate(
        [
            np.broadcast_to(run, (size, readings.runs))
            for (_, run), size in zip(weights.values(), sizes, strict=True)
        ]
    )
    parts = np.split(readings.estimates(layer_weights, run_weights), np.cumsum(sizes)[:-1])
    return dict(zip(weights, parts, strict=True))


def _with_borrowed_runs(
    name: str,
    found: Mapping[str, Replicates],
    methods: Mapping[str, Readings],
    rng: np.random.Generator,
) -> Replicates:
    """The replicates of a method of one run, with the run-to-run spread of the most often run."""
    own = found[name]
    lender = max(methods, key=lambda other: methods[other].runs)
    readings = methods[lender]
    if readings.runs < 2:
        return own
    each = readings.estimates(np.ones((readings.runs, readings.layers)), np.eye(readings.runs))
    away = (each - each.mean(axis=0)) * np.sqrt(readings.runs / (readings.runs - 1))
    away = np.where(np.isfinite(away), away, 0.0)
    picked = away[rng.integers(readings.runs, size=len(own.drawn))]
    key = f"runs of {name}"
    # so that (n − 1) times the variance over the n things left out is the variance of one run
    left_out = own.left_out | {key: own.centre + away / np.sqrt(readings.runs - 1)}
    return Replicates(own.centre, own.drawn + picked, left_out, own.cells)


def infer(
    statistic: Callable[[Sequence[FloatArray]], FloatArray], methods: Sequence[Replicates]
) -> Inference:
    """Standard errors of a statistic of the estimates of some methods.

    The standard error is the larger of two: the spread over the resamples (that of the normal
    distribution with the same central 80%, widened by √(n/(n − 1))), and the jackknife's, from
    leaving out each layer and each run, which for a mean over layers is exact. Either alone is a
    little too small where there are six layers. What differs from layer to layer anew in each run
    is in the variance over layers and in that over runs; it is counted once. Student's degrees of
    freedom are Satterthwaite's.

    Args:
        statistic: from the methods' estimates, each of shape (n, measures), to (n, results).
        methods: replicates made together.

    Returns:
        Arrays of shape (results,).
    """
    with np.errstate(all="ignore"):
        centre = statistic([method.centre[None] for method in methods])[0]
        drawn = statistic([method.drawn for method in methods])
        parts, net, sizes = [], [], []
        for thing in dict.fromkeys(key for method in methods for key in method.left_out):
            replicates = _leaving_out(statistic, methods, [m.left_out.get(thing) for m in methods])
            part = (len(replicates) - 1) * replicates.var(axis=0)
            parts.append(part)
            sizes.append(len(replicates))
            owners = [thing.startswith("runs") and thing in m.left_out for m in methods]
            if any(owners):
                cells = [m.cells if own else None for m, own in zip(methods, owners, strict=True)]
                once = _leaving_out(statistic, methods, cells)
                twice = (len(once) - 1) * once.var(axis=0)
                part = np.maximum(part - np.where(np.isfinite(twice), twice, 0.0), 0.0)
            net.append(part)
        variances, number = np.stack(net), np.array(sizes)[:, None]
        whole = variances.sum(axis=0)
        positive = np.where(whole > 0, whole, 1.0)
        kept = np.sum(np.stack(parts) * (number - 1) / number, axis=0)
        factor = np.where(kept > 0, whole / np.where(kept > 0, kept, 1.0), 1.0)
        inverse = np.sum((variances / positive) ** 2 / (number - 1), axis=0)
        freedom = 1 / np.maximum(inverse, 1 / np.sum(number - 1))

    defined = np.isfinite(drawn).any(axis=0) & np.isfinite(centre) & np.isfinite(whole)
    low, high = np.nanquantile(np.where(defined, drawn, 0.0), [_TAIL, 1 - _TAIL], axis=0)
    spread = (high - low) / (2 * stats.norm.ppf(1 - _TAIL))
    smallest = 1e-9 * np.maximum(np.abs(centre), 1e-3)  # what rounding alone makes
    error = np.maximum.reduce([np.sqrt(factor) * spread, np.sqrt(whole), smallest])
    error = np.where(defined, error, np.nan)
    return Inference(centre, error, np.where(defined, freedom, np.nan))


def _leaving_out(
    statistic: Callable[[Sequence[FloatArray]], FloatArray],
    methods: Sequence[Replicates],
    replicates: Sequence[FloatArray | None],
) -> FloatArray:
    """The statistic over replicates of some methods, the others as they are."""
    size = max(len(r) for r in replicates if r is not None)
    return statistic(
        [
            np.broadcast_to(method.centre, (size, len(method.centre))) if r is None else r
            for method, r in zip(methods, replicates, strict=True)
        ]
    )


def difference(first: Replicates, second: Replicates) -> Inference:
    """The measures of one method less those of another."""
    return infer(lambda estimates: estimates[0] - estimates[1], [first, second])


def holm(p_values: FloatArray) -> FloatArray:
    """p-values adjusted for their number (Holm 1979); NaN stays NaN and is not counted.

    Calling what is below 0.05 makes a false call in at most 5 of 100 families, however the tests
    depend on one another.
    """
    adjusted = np.full(len(p_values), np.nan)
    tested = np.flatnonzero(np.isfinite(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p_values[order]))
    return adjusted


def _drawn(things: int, resamples: int, rng: np.random.Generator) -> FloatArray:
    """How often each thing is in each resample, shape (resamples, things)."""
    return rng.multinomial(things, np.full(things, 1 / things), size=resamples).astype(np.float64)
