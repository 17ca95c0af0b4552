"""What a row of the trajectory says of the units of a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_dynamics._arrays import RECTANGLE, Array, Rows, as_numbers, is_finite, library_of
from dora_dynamics.correlation import moments, relations
from dora_dynamics.units.arithmetic import DIRECTED, MEASURES, TERMS, Measures, measures, terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dora_dynamics.correlation import FloatArray
    from dora_dynamics.decomposition import WeightChange


@dataclass(frozen=True)
class UnitSummary(Measures):
    """The measures of one weight and the relations across its units.

    Attributes:
        units: number of units.
        unit_coupling: this and what follows as in `trajectory.COLUMNS`.
    """

    units: int
    unit_coupling: float
    unit_rank_coupling: float
    unit_slope: float
    signed_unit_coupling: float
    signed_unit_rank_coupling: float
    signed_unit_slope: float


_NAMES = tuple(field.name for field in fields(UnitSummary) if field.name != "units")
_COUNTS = tuple(_NAMES.index(name) for name in MEASURES[-2:])


def summary_terms(units: Sequence[Array]) -> Array:
    """Of each unit what `summary_sums` takes, of any shape and on any device, in one array.

    Args:
        units: the six arrays of `units.arithmetic`.
    """
    library = library_of(units[0])
    found = terms(units)
    directed = found[DIRECTED]
    turned, difference = units[3], units[2]
    values = library.stack([turned, abs(difference), difference])
    finite = is_finite(values)
    bad = directed * as_numbers(~finite)
    values = library.where(finite, values, 0.0) * directed
    return library.concatenate([library.stack(found), bad, values])


def summary_sums(terms: Array, rows: Rows = RECTANGLE) -> Array:
    """All that a summary needs of the units of weights.

    Args:
        terms: shape (16, weights, units), of `summary_terms`, or as `rows` say.
        rows: how the units of the weights lie.

    Returns:
        Shape (35, weights), on the same device, for `finished`. Each weight's numbers are its own,
        to the last bit of numpy's, whatever the others are.
    """
    (sums,) = rows.sums(terms[: TERMS + 3])
    found = moments(terms[TERMS + 3 :], terms[DIRECTED], sums[DIRECTED], rows)
    return library_of(terms).concatenate([sums, found])


def finished(sums: FloatArray, counts: Sequence[int]) -> list[UnitSummary]:
    """The summaries of weights, from what `summary_sums` returned, on the host.

    Args:
        sums: shape (35, weights).
        counts: how many units each has.
    """
    own, bad, found = np.split(sums, [TERMS, TERMS + 3])
    related = relations(found, own[DIRECTED], bad == 0)
    numbers = np.concatenate(
        [measures(own, np.array(counts, np.float64)), related[:, 0], related[:, 1]]
    )
    columns = numbers.tolist()
    for i in _COUNTS:
        columns[i] = list(map(int, columns[i]))
    return [
        _summary(count, values)
        for count, values in zip(counts, zip(*columns, strict=True), strict=True)
    ]


def _summary(units: int, values: Sequence[float]) -> UnitSummary:
    """What `UnitSummary(...)` makes, in a quarter of the time: there are as many as weights."""
    made = UnitSummary.__new__(UnitSummary)
    vars(made).update(zip(_NAMES, values, strict=True), units=units)
    return made


def unmeasured(units: int) -> UnitSummary:
    """The summary of a weight that could not be measured: NaN, and of its units none is finite."""
    numbers: dict[str, Any] = dict.fromkeys(_NAMES, math.nan)
    return UnitSummary(units=units, **numbers | {"zero_units": 0, "non_finite": units})


def summary_of(change: WeightChange) -> UnitSummary:
    """The summary of one measured change."""
    own = summary_terms(change.units.arrays())[:, np.newaxis]
    return finished(summary_sums(own), [len(change.units)])[0]
