"""From sites and their weights to measured changes: where weights meet the arithmetic."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from dora_dynamics._kernels import (
    LowRankUpdate,
    Transfer,
    queue_dense_sums,
    queue_low_rank_sums,
)
from dora_dynamics.decomposition import (
    UnitChange,
    _rescale,
    low_rank_change,
    reduce_units,
    unit_change,
    weight_change,
)
from dora_dynamics.effective import Dense
from dora_dynamics.sharded import Adapted, is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from dora_dynamics.decomposition import Axis, WeightChange
    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.sites import Site

    Triple = tuple[Site, Tensor, EffectiveWeight | Adapted]


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


def measure_all(weights: Iterable[Triple], axis: Axis) -> list[WeightChange]:
    """`measure` for many sites at once: (site, baseline, effective weight) of each, in order.

    All weights of one device are measured together: on a GPU in one launch per dtype and layout
    and one transfer back. Sites that are parts or heads of one matrix and follow each other are
    measured in one reading of it: each unit is measured by itself, so that the units of a part
    are those of the whole. Where W_0 is sharded, all processes call this with the same sites, and
    one all-reduce adds up what they hold.
    """
    transfer = Transfer()
    finish = queue_measuring(weights, axis, transfer)
    transfer.start()
    return finish()


def queue_measuring(
    weights: Iterable[Triple], axis: Axis, transfer: Transfer
) -> Callable[[], list[WeightChange]]:
    """Start `measure_all`, and on a GPU wait for nothing but sharded weights.

    Returns:
        A function that gives the changes once the transfer is started, in any thread; the weights
        may be changed or let go of before, unless `transfer.needs_weights`.
    """
    weights = list(weights)
    if axis == "input":
        return _queue_together(weights, axis, transfer)
    groups = [
        list(group)
        for _, group in groupby(weights, key=lambda weight: (weight[0].tensor, weight[0].expert))
    ]
    spans = [_span([site for site, _, _ in group]) for group in groups]
    finish_wholes = _queue_together(
        [
            (span, baseline, effective)
            for span, ((_, baseline, effective), *_) in zip(spans, groups, strict=True)
        ],
        axis,
        transfer,
    )
    parts = [[site for site, _, _ in group] for group in groups]

    def finish() -> list[WeightChange]:
        return [
            _part_of(whole, span, site)
            for whole, span, sites in zip(finish_wholes(), spans, parts, strict=True)
            for site in sites
        ]

    return finish


def _queue_together(
    weights: Sequence[Triple], axis: Axis, transfer: Transfer
) -> Callable[[], list[WeightChange]]:
    """`measure` of each, with the sums of all that can be summed together taken at once."""
    sharded = [(site, w_0, w) for site, w_0, w in weights if is_sharded(w_0)]
    whole = [
        (site, w_0, w)
        for site, w_0, w in weights
        if not (is_sharded(w_0) or isinstance(w, Adapted))
    ]
    changes = iter(_measure_sharded(sharded, axis))
    finish_whole = _queue_whole(whole, axis, transfer)
    order = [is_sharded(w_0) for _, w_0, _ in weights]

    def finish() -> list[WeightChange]:
        rest = iter(finish_whole())
        return [next(changes if apart else rest) for apart in order]

    return finish


def _measure_sharded(
    weights: Sequence[tuple[Site, DTensor, EffectiveWeight | Adapted]], axis: Axis
) -> list[WeightChange]:
    """Now and in this thread: the training's own collectives must not come in between."""
    if not weights:
        return []
    from dora_dynamics.sharded.changes import unit_changes

    return [reduce_units(units, axis) for units in unit_changes(weights, axis)]


def _queue_whole(
    weights: Sequence[tuple[Site, Tensor, EffectiveWeight]], axis: Axis, transfer: Transfer
) -> Callable[[], list[WeightChange]]:
    """`_queue_together` for weights that this process has whole."""
    dense: dict[int, tuple[Tensor, Tensor]] = {}
    low_rank: dict[int, LowRankUpdate] = {}
    magnitudes: dict[int, Callable[[], Tensor]] = {}
    for i, (site, baseline, effective) in enumerate(weights):
        before = site.oriented(baseline)
        if isinstance(effective, Dense):
            after = site.oriented(effective.weight)
            if _comparable(before, after):
                dense[i] = (before, after) if axis == "output" else (before.T, after.T)
            continue
        A, B, m = effective.A, site.select(effective.B), effective.magnitude
        fits = _is_matrix(before) and (B.shape[0], A.shape[1]) == before.shape
        if not fits or A.shape[0] != B.shape[1]:
            continue
        if m is None:
            factors = (before, A, B) if axis == "output" else (before.T, B.T, A.T)
            low_rank[i] = LowRankUpdate(*factors, effective.scaling)
        elif axis == "output" and m.ndim == 1 and len(site.select(m)) == len(B):
            low_rank[i] = LowRankUpdate(before, A, B, effective.scaling)
            magnitudes[i] = transfer.add(site.select(m))
    queued = (*dense, *low_rank)
    finish_dense = queue_dense_sums(list(dense.values()), transfer)
    finish_low_rank = queue_low_rank_sums(list(low_rank.values()), transfer)
    alone = {  # not measurable together, or not at all: then this tells why
        i: measure(*weight, axis) for i, weight in enumerate(weights) if i not in queued
    }

    def finish() -> list[WeightChange]:
        found = dict(alone)
        for i, one in zip(queued, (*finish_dense(), *finish_low_rank()), strict=True):
            units = _rescale(one, magnitudes[i]()) if i in magnitudes else unit_change(one)
            found[i] = reduce_units(units, axis)
        return [found[i] for i in sorted(found)]

    return finish


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.numel() > 0 and weight.dtype.is_floating_point


def _comparable(before: Tensor, after: Tensor) -> bool:
    return _is_matrix(before) and (before.shape, before.dtype, before.device) == (
        *(after.shape, after.dtype, after.device),
    )


def _span(sites: Sequence[Site]) -> Site:
    """The smallest range of rows that holds all of these sites of one matrix, as a site."""
    if any(site.rows is None for site in sites):
        return replace(sites[0], rows=None)
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
