"""From sites and their weights to measured changes: where weights meet the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from dora_dynamics._arrays import Array, is_sharded, library_of
from dora_dynamics._kernels import (
    LowRankUpdate,
    Transfer,
    queue_dense_sums,
    queue_low_rank_sums,
)
from dora_dynamics.decomposition import (
    UnitChange,
    WeightChange,
    low_rank_change,
    weight_change,
)
from dora_dynamics.effective import Check, Dense, LowRank
from dora_dynamics.effective.factors import built
from dora_dynamics.sharded import Adapted
from dora_dynamics.units.arithmetic import (
    LEAST_LEFT,
    LEAST_LEFT_BY_FACTORS,
    MEASURES,
    rescaled,
    unit_arrays,
)
from dora_dynamics.units.batches import Ranges, batched_sums, length, picked
from dora_dynamics.units.summary import UnitSummary, finished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from dora_dynamics.correlation import FloatArray
    from dora_dynamics.decomposition import Axis
    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.sites import Site

    Triple = tuple[Site, Tensor, EffectiveWeight | Adapted]

_HOST = torch.device("cpu")


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


@dataclass(frozen=True)
class Measured:
    """The change at one site.

    Attributes:
        summary: what a row says of it.
        units: the per-unit arrays, where they were asked for.
    """

    summary: UnitSummary
    units: UnitChange | None


def measure_all(weights: Iterable[Triple], axis: Axis) -> list[WeightChange]:
    """`measure` for many sites at once: (site, baseline, effective weight) of each, in order.

    As `Measurement` measures them. Where W_0 is sharded, all processes call this with the same
    sites, and one all-reduce adds up what they hold.
    """
    changes = []
    for one in _at_once(weights, axis, keep_units=True):
        assert one.units is not None
        measures: dict[str, Any] = {name: getattr(one.summary, name) for name in MEASURES}
        changes.append(WeightChange(axis, one.units, **measures))
    return changes


def summarize_all(weights: Iterable[Triple], axis: Axis) -> list[UnitSummary]:
    """What rows say of many sites, as `measure_all`, without the per-unit arrays."""
    return [measured.summary for measured in _at_once(weights, axis, keep_units=False)]


def _at_once(weights: Iterable[Triple], axis: Axis, *, keep_units: bool) -> list[Measured]:
    measurement = Measurement(axis, keep_units=keep_units)
    measurement.add(weights)
    measurement.start()
    for check in measurement.failed_checks():
        raise check.otherwise
    return measurement.finish()


class Measurement:
    """The changes of many sites, measured together: `add` some, `start`, then `finish`.

    All weights of one device are measured together: on a GPU in one launch per dtype and layout
    and one transfer back. Sites that are parts or heads of one matrix and follow each other are
    measured in one reading of it: each unit is measured by itself, so that the units of a part
    are those of the whole.

    On a GPU `add` and `start` wait for nothing but sharded weights.
    """

    def __init__(self, axis: Axis, *, keep_units: bool = False) -> None:
        """Begin with no site.

        Args:
            axis: which axis the units are.
            keep_units: whether the per-unit arrays go to the host, and not their summaries alone.
        """
        self._axis: Axis = axis
        self._keep_units = keep_units
        self._transfer = Transfer()
        self._parts: dict[torch.device, list[Array]] = {}
        self._sites: list[tuple[torch.device, Ranges]] = []
        self._columns: dict[torch.device, tuple[list[int], Callable[[], FloatArray]]] = {}
        self._units: dict[torch.device, Callable[[], FloatArray]] = {}
        self._checks: dict[torch.device, list[Check]] = {}
        self._answers: list[tuple[list[Check], Callable[[], FloatArray]]] = []

    def passing_bytes(self, before: Tensor, effective: EffectiveWeight | Adapted) -> int:
        """Bytes that `add` takes to build W' and its W_0: of a DoRA with units of the input.

        DoRA scales the outputs, which mixes units of the input, so that factors do not do.
        """
        is_dora = isinstance(effective, LowRank) and effective.magnitude is not None
        return 16 * before.numel() if is_dora and self._axis == "input" else 0

    def add(self, weights: Iterable[Triple]) -> None:
        """Begin to sum these weights, and take their checks along.

        They may be changed afterwards, by work that is queued behind this, but for DoRA's
        magnitudes: those not before `start`.
        """
        weights = list(weights)
        for check in dict.fromkeys(check for _, _, w in weights for check in checks_of(w)):
            self._checks.setdefault(check.holds.device, []).append(check)
        if self._axis == "input":
            groups = [[weight] for weight in weights]
            spans = [site for site, _, _ in weights]
        else:
            groups = [
                list(group)
                for _, group in groupby(weights, key=lambda w: (w[0].tensor, w[0].expert))
            ]
            spans = [_span([site for site, _, _ in group]) for group in groups]
        places = self._begun(
            [(span, w_0, w) for span, ((_, w_0, w), *_) in zip(spans, groups, strict=True)]
        )
        for span, place, group in zip(spans, places, groups, strict=True):
            for site, _, _ in group:
                self._sites.append((place.device, _within(site, span, place)))

    def add_measured(self, changes: Iterable[UnitChange]) -> None:
        """Take along what is measured already: sharded weights, by all processes together."""
        for units in changes:
            (place,) = self._placed([0], [len(units)], units.arrays()).values()
            self._sites.append((place.device, ((place.first, place.first + place.units),)))

    def start(self) -> None:
        """Begin to summarize what was added, and the transfer of that to the host."""
        with torch.no_grad():
            for device, parts in self._parts.items():
                units = library_of(parts[0]).concatenate(parts, 1)
                here = [i for i, (place, _) in enumerate(self._sites) if place == device]
                found, order = batched_sums(units, [self._sites[i][1] for i in here])
                self._columns[device] = [here[i] for i in order], self._bring(found)
                if self._keep_units:
                    self._units[device] = self._bring(units)
            for device, checks in self._checks.items():
                holds = torch.stack([check.holds for check in checks]).to(torch.float64)
                on_host = device.type == "cpu"
                self._answers.append((checks, self._bring(holds.numpy() if on_host else holds)))
            self._transfer.start()
        self._parts.clear()

    def failed_checks(self) -> list[Check]:
        """The checks of the weights that do not hold; waits for the transfer if there are any."""
        return [
            check
            for checks, get in self._answers
            for check, holds in zip(checks, get(), strict=True)
            if not holds
        ]

    def finish(self) -> list[Measured]:
        """Wait, and give the changes in the order in which the sites were added; in any thread.

        They mean nothing where a check of the weight does not hold (see `failed_checks`).
        """
        found: dict[int, UnitSummary] = {}
        for order, get in self._columns.values():
            counts = [length(self._sites[i][1]) for i in order]
            found.update(zip(order, finished(get(), counts), strict=True))
        units = {device: get() for device, get in self._units.items()}
        return [
            Measured(found[i], UnitChange(*picked(units[device], ranges)) if units else None)
            for i, (device, ranges) in enumerate(self._sites)
        ]

    def _bring(self, array: Array) -> Callable[[], FloatArray]:
        if isinstance(array, np.ndarray):
            return lambda: array
        return self._transfer.add(array)

    def _begun(self, weights: Sequence[Triple]) -> list[_Place]:
        """Begin with these weights, each whole; where the units of each will be."""
        sharded = {i: (site, w_0, w) for i, (site, w_0, w) in enumerate(weights) if is_sharded(w_0)}
        dense: dict[int, tuple[Tensor, Tensor]] = {}
        lora: dict[int, LowRankUpdate] = {}
        dora: dict[int, tuple[LowRankUpdate, Tensor]] = {}
        for i, (site, baseline, effective) in enumerate(weights):
            if i in sharded or isinstance(effective, Adapted):
                continue
            before = site.oriented(baseline)
            if isinstance(effective, Dense):
                after = site.oriented(effective.weight)
                if _comparable(before, after):
                    along = self._axis == "output"
                    dense[i] = (before, after) if along else (before.T, after.T)
                continue
            A, B, m = effective.A, site.select(effective.B), effective.magnitude
            fits = _is_matrix(before) and (B.shape[0], A.shape[1]) == before.shape
            if not fits or A.shape[0] != B.shape[1]:
                continue
            if m is not None and self._axis == "input":
                if (scale := site.select(m)).shape == (len(B),):
                    base = before.to(torch.float64)
                    after = built(base, replace(effective, B=B, magnitude=scale))
                    dense[i] = base.T, after.T
                continue
            update = LowRankUpdate(before, A, B, effective.scaling)
            if m is None:
                lora[i] = update if self._axis == "output" else update.transposed
            elif m.ndim == 1 and len(site.select(m)) == len(B):
                dora[i] = update, site.select(m)

        places: dict[int, _Place] = {}
        for members, queued, least_left in (
            (list(dense), queue_dense_sums(list(dense.values())), LEAST_LEFT),
            (list(lora), queue_low_rank_sums(list(lora.values())), LEAST_LEFT_BY_FACTORS),
        ):
            for some in queued:
                own = [members[i] for i in some.which]
                arrays = unit_arrays(*some.sums, least_left=least_left)
                places |= self._placed(own, some.units, arrays)
        members = list(dora)
        for some in queue_low_rank_sums([update for update, _ in dora.values()]):
            own = [members[i] for i in some.which]
            m = _magnitudes([dora[i][1] for i in own], some.sums)
            turned = unit_arrays(*some.sums, least_left=LEAST_LEFT_BY_FACTORS)
            places |= self._placed(own, some.units, rescaled(turned, some.sums[3], m))
        here = {
            i: measure(site, w_0, w, self._axis).units  # not together, or not at all: this tells
            for i, (site, w_0, w) in enumerate(weights)
            if not (i in sharded or i in places or isinstance(w, Adapted))
        }
        here |= dict(
            zip(sharded, _measure_sharded(list(sharded.values()), self._axis), strict=True)
        )
        for i, units in here.items():
            places |= self._placed([i], [len(units)], units.arrays())
        return [places[i] for i in range(len(weights))]

    def _placed(
        self, members: Sequence[int], counts: Sequence[int], units: Sequence[Array]
    ) -> dict[int, _Place]:
        """Put the six arrays of some weights behind those that are there."""
        stacked = library_of(units[0]).stack(list(units))
        device = _HOST if isinstance(stacked, np.ndarray) else stacked.device
        parts = self._parts.setdefault(device, [])
        first = sum(part.shape[1] for part in parts)
        parts.append(stacked)
        firsts = accumulate(counts, initial=first)
        return {
            i: _Place(device, start, count)
            for i, start, count in zip(members, firsts, counts, strict=False)
        }


class _Place(NamedTuple):
    """Where the units of a weight are: on which device, from where, how many."""

    device: torch.device
    first: int
    units: int


def _measure_sharded(
    weights: Sequence[tuple[Site, DTensor, EffectiveWeight | Adapted]], axis: Axis
) -> list[UnitChange]:
    """Now and in this thread: the training's own collectives must not come in between."""
    if not weights:
        return []
    from dora_dynamics.sharded.changes import unit_changes

    return unit_changes(weights, axis)


def _magnitudes(magnitudes: Sequence[Tensor], beside: Array) -> Array:
    """DoRA's m of some weights, one after the other, where their sums are."""
    joined = torch.cat([m.detach().reshape(-1) for m in magnitudes]).to(torch.float64)
    if isinstance(beside, np.ndarray):
        return joined.numpy(force=True)
    return joined.to(beside.device)


def checks_of(effective: EffectiveWeight | Adapted) -> tuple[Check, ...]:
    """What must hold for it to be the weight that its module applies."""
    return effective.checks if isinstance(effective, Dense) else ()


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.numel() > 0 and weight.dtype.is_floating_point


def _comparable(before: Tensor, after: Tensor) -> bool:
    return _is_matrix(before) and (before.shape, before.dtype, before.device) == (
        *(after.shape, after.dtype, after.device),
    )


def _span(sites: Sequence[Site]) -> Site:
    """The smallest range of rows that holds all of these sites of one matrix, as a site."""
    if len(sites) == 1 and sites[0].rows is None:
        return sites[0]
    if any(site.rows is None for site in sites):
        return replace(sites[0], rows=None)
    ranges = [rows for site in sites for rows in site.rows or ()]
    return replace(
        sites[0], rows=((min(start for start, _ in ranges), max(stop for _, stop in ranges)),)
    )


def _within(site: Site, span: Site, place: _Place) -> Ranges:
    """Where the units of a site are, which is a part of a span that has its place."""
    if site.rows == span.rows or site.rows is None:
        return ((place.first, place.first + place.units),)
    first = place.first - (span.rows[0][0] if span.rows else 0)
    return tuple((first + start, first + stop) for start, stop in site.rows)
