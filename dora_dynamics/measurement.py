"""From sites and their weights to measured changes: where weights meet the arithmetic."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dora_dynamics.decomposition import UnitChange, low_rank_change, reduce_units, weight_change
from dora_dynamics.effective import Dense

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from dora_dynamics.decomposition import Axis, WeightChange
    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.sites import Site


def measure(site: Site, baseline: Tensor, effective: EffectiveWeight, axis: Axis) -> WeightChange:
    """The change from `baseline` (W_0 as the module stores it) to the effective weight."""
    before = site.oriented(baseline)
    if isinstance(effective, Dense):
        return weight_change(before, site.oriented(effective.weight), axis)
    return low_rank_change(
        before,
        effective.A,
        site.select(effective.B),
        scaling=effective.scaling,
        magnitude=None if effective.magnitude is None else site.select(effective.magnitude),
        axis=axis,
    )


def measure_all(
    weights: Iterable[tuple[Site, Tensor, EffectiveWeight]], axis: Axis
) -> list[WeightChange]:
    """`measure` for many sites at once: (site, baseline, effective weight) of each, in order.

    Sites that are parts or heads of one matrix and follow each other are measured in one reading
    of it: each unit is measured by itself, so that the units of a part are those of the whole.
    """
    weights = list(weights)
    if axis == "input":
        return [measure(site, baseline, effective, axis) for site, baseline, effective in weights]
    changes: list[WeightChange] = []
    for _, group in groupby(weights, key=lambda weight: (weight[0].tensor, weight[0].expert)):
        together = list(group)
        span = _span([site for site, _, _ in together])
        _, baseline, effective = together[0]
        whole = measure(span, baseline, effective, axis)
        changes.extend(_part_of(whole, span, site) for site, _, _ in together)
    return changes


def _span(sites: Sequence[Site]) -> Site:
    """The smallest range of rows that holds all of these sites of one matrix, as a site."""
    if sites[0].stored_transposed or any(site.rows is None for site in sites):
        return replace(sites[0], rows=None)  # units that are columns in memory are read together
    ranges = [rows for site in sites for rows in site.rows or ()]
    return replace(
        sites[0], rows=((min(start for start, _ in ranges), max(stop for _, stop in ranges)),)
    )


def _part_of(change: WeightChange, span: Site, site: Site) -> WeightChange:
    if site.rows == span.rows or site.rows is None:
        return change
    first = span.rows[0][0] if span.rows else 0
    chosen = np.concatenate([np.arange(start - first, stop - first) for start, stop in site.rows])
    units = UnitChange(
        **{f.name: getattr(change.units, f.name)[chosen] for f in fields(UnitChange)}
    )
    return reduce_units(units, change.axis)
