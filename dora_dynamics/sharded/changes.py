"""The change of each unit of sharded weights, from the blocks that each process holds.

A block's own sums a_s, e_s, c_s and P_s add up over blocks, but for P: with k_s = e_s/a_s,
P = Σ P_s + Σ a_s (k_s − k)². Where units lie whole on one process the second sum is zero. Where
they are split, P = c − e²/a, and only where that cancels (an almost radial change) the second sum
is taken as it stands: one more all-reduce of these units, no weight read again.

Whatever a process fails at, it takes part in every all-reduce, with nothing for the weights in
question and word of it: all processes leave these weights out, and none waits for another.

On a GPU a record waits for the device: for the sums of all blocks, which come over together, and
for each all-reduce; and for each weight that has to be built (PiSSA's, DoRA's along the input).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from dora_dynamics._kernels.sums import TANGENTIAL_SHARE, from_array
from dora_dynamics.decomposition import UnitChange, _rescale, unit_change
from dora_dynamics.effective import Dense, LowRank
from dora_dynamics.sharded.adapted import Weight, by_tensor, form_of, is_built, wanted
from dora_dynamics.sharded.collectives import added, device_of, joined
from dora_dynamics.sharded.holding import held
from dora_dynamics.sharded.shares import shares_of, squared_norms
from dora_dynamics.units.arithmetic import LEAST_LEFT, LEAST_LEFT_BY_FACTORS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from dora_dynamics.decomposition import Axis
    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.sharded.adapted import Form
    from dora_dynamics.sharded.holding import Adapted
    from dora_dynamics.sharded.shares import Share
    from dora_dynamics.sites import Site

    Array = NDArray[np.float64]


def unit_changes(
    weights: Sequence[tuple[Site, DTensor, EffectiveWeight | Adapted]], axis: Axis
) -> list[UnitChange]:
    """The change of each unit of each site, the same on all processes.

    All processes call this with the same sites. One all-reduce adds the sums of all sites; what
    there is beside it is of rank size (see `joined`), or needed where `_between` says.

    Args:
        weights: of each site W_0 and W'.
        axis: which axis the units are.

    Raises:
        ShardingError: a weight is not held whole by the processes together, or one of them failed.
        ValueError: an adapter's factors do not fit the weight.
    """
    given = by_tensor(weights)
    forms = [form_of(weight, axis) for weight in given]
    found = []
    for changes in exchanged(given, forms, axis).changes:
        if isinstance(changes, Exception):
            raise changes
        found += changes
    return found


def mean_magnitudes(weights: Sequence[tuple[Site, DTensor]], axis: Axis) -> list[float]:
    """Mean magnitude of the units of each site; all processes call this."""
    same = [(site, weight, Dense(weight)) for site, weight in weights]
    return [float(change.magnitude_before.mean()) for change in unit_changes(same, axis)]


@dataclass(frozen=True)
class Exchanged:
    """What the processes found together.

    Attributes:
        changes: of each weight, those at its sites; or why there are none, here or elsewhere.
        said: what was said beside, added up.
    """

    changes: list[list[UnitChange] | Exception]
    said: Array


def exchanged(
    weights: Sequence[Weight],
    forms: Sequence[Form | None],
    axis: Axis,
    unfit: Mapping[int, Exception] | None = None,
    say: Sequence[float] = (),
) -> Exchanged:
    """Measure weights together with all other processes.

    Args:
        weights: what is measured, the same on all processes.
        forms: of each the form that all processes go by; None leaves it out.
        axis: which axis the units are.
        unfit: the weights that this process has in another form, by position, and what that is.
        say: numbers that are told to the others.

    Raises:
        ShardingError: a weight is not held whole by the processes together.
    """
    device = device_of(weights[0].before)
    failures = dict(unfit or {})
    for i, weight in enumerate(weights):
        if isinstance(weight.after, Exception):
            failures[i] = weight.after
    whole = _whole_factors(weights, forms, failures, device)
    norms, elsewhere = _turned_norms(weights, forms, whole, failures, device)
    left_out = elsewhere | failures
    shares = shares_of(weights, whole, norms, left_out, axis)
    failures |= {i: error for i, error in left_out.items() if i not in elsewhere}
    sums, elsewhere, said = _sums(shares, failures, device, say)
    changes: list[list[UnitChange] | Exception] = []
    for i, weight in enumerate(weights):
        its_sums = sums[i]
        if its_sums is None:
            changes.append(failures.get(i) or elsewhere[i])
            continue
        try:
            changes.append(_changes(weight, its_sums, whole[i], axis))
        except Exception as error:
            changes.append(error)
    return Exchanged(changes, said)


def _changes(
    weight: Weight, tables: Sequence[Array], whole: Mapping[str, Tensor], axis: Axis
) -> list[UnitChange]:
    factors = weight.after
    if isinstance(factors, LowRank) and factors.magnitude is not None and axis == "output":
        m, _ = held(whole.get("magnitude", factors.magnitude))
        return [
            _rescale(from_array(table), site.select(m).detach().to("cpu", torch.float64))
            for site, table in zip(weight.sites, tables, strict=True)
        ]
    is_low_rank = isinstance(factors, LowRank) and not is_built(weight, axis)
    least_left = LEAST_LEFT_BY_FACTORS if is_low_rank else LEAST_LEFT
    return [unit_change(from_array(table), least_left=least_left) for table in tables]


def _whole_factors(
    weights: Sequence[Weight],
    forms: Sequence[Form | None],
    failures: dict[int, Exception],
    device: torch.device,
) -> list[dict[str, Tensor]]:
    """The factors that some process needs and has a part of only, whole, of each weight."""
    places = [(i, name) for i, form in enumerate(forms) if form for name, *_ in form.parts]
    tensors = [
        one
        for i, (weight, form) in enumerate(zip(weights, forms, strict=True))
        if form
        for one in wanted(weight, form, has_part=i not in failures)
    ]
    parts, failed = joined(tensors, device)
    failures |= {places[i][0]: error for i, error in failed.items()}
    found: list[dict[str, Tensor]] = [{} for _ in weights]
    for (i, name), tensor in zip(places, parts, strict=True):
        found[i][name] = tensor
    return found


def _turned_norms(
    weights: Sequence[Weight],
    forms: Sequence[Form | None],
    whole: Sequence[Mapping[str, Tensor]],
    failures: dict[int, Exception],
    device: torch.device,
) -> tuple[list[list[Array] | None], dict[int, Exception]]:
    """‖base + s·B A‖ of each row of the DoRA weights that must be built, by weight and site.

    Returns:
        These, and where other processes failed.
    """
    found: list[list[Array] | None] = [None] * len(weights)
    needed = [i for i, form in enumerate(forms) if form and form.has_norms]
    if not needed:
        return found, {}
    vectors, counts, elements, members = [], [], [], []
    for i in needed:
        weight = weights[i]
        for site in weight.sites:
            rows, columns = site.extent(weight.before.shape)
            squares, count = np.zeros(rows), 0
            if i not in failures:
                try:
                    squares, count = squared_norms(weight, site, whole[i])
                except Exception as error:
                    failures[i] = error
            vectors.append(squares)
            counts.append(count)
            elements.append(rows * columns)
            members.append(i)
    failed = [place for place, i in enumerate(members) if i in failures]
    sums = added(vectors, counts, elements, failed, device)
    for i, total in zip(members, sums.totals, strict=True):
        if total is not None:
            norms = found[i] = found[i] or []
            norms.append(np.sqrt(total))
    return found, {members[place]: error for place, error in sums.failures.items()}


def _sums(
    shares: Sequence[Sequence[Share]],
    failures: dict[int, Exception],
    device: torch.device,
    say: Sequence[float],
) -> tuple[list[list[Array] | None], dict[int, Exception], Array]:
    """The sums of each weight's sites over all processes, by one all-reduce and, seldom, a second.

    Returns:
        These, or None where a process failed; why; and what was said beside.
    """
    every = [share for its_shares in shares for share in its_shares]
    members = [i for i, its_shares in enumerate(shares) for _ in its_shares]
    vectors = []
    for share in every:
        vector = np.zeros(4 * share.units + 1)
        table = vector[:-1].reshape(4, share.units)
        for units, sums in share.pieces:
            table[:, units] += sums.table.numpy(force=True)
        vector[-1] = share.is_split
        vectors.append(vector)
    held_elements, elements = [s.held for s in every], [s.elements for s in every]
    failed = [place for place, i in enumerate(members) if i in failures]
    found = added(vectors, held_elements, elements, failed, device, say)
    elsewhere: dict[int, Exception] = {members[p]: error for p, error in found.failures.items()}
    tables: dict[int, Array] = {}
    doubtful: dict[int, NDArray[np.intp]] = {}
    for place, total in enumerate(found.totals):
        if total is None:
            continue
        table = tables[place] = total[:-1].reshape(4, -1)
        if total[-1] == 0:
            continue  # each unit lies whole on a process, which knows its P
        a, e, c, P = table
        with np.errstate(all="ignore"):
            simple = c - np.where(a == 0, 0.0, e * e / a)
        trusted = TANGENTIAL_SHARE * c <= simple
        P[trusted] = simple[trusted]
        if not trusted.all():
            doubtful[place] = np.flatnonzero(~trusted)
    if doubtful:  # found in what all processes have alike: all come here, or none
        between = [_between(every[p], tables[p], units) for p, units in doubtful.items()]
        more = added(
            between, [held_elements[p] for p in doubtful], [elements[p] for p in doubtful],
            (), device,
        )  # fmt: skip
        for (place, units), extra in zip(doubtful.items(), more.totals, strict=True):
            if extra is not None:
                tables[place][3, units] += extra
    firsts = [0, *accumulate(len(its_shares) for its_shares in shares)]
    return (
        [
            None if i in elsewhere else [tables[place] for place in range(first, end)]
            for i, (first, end) in enumerate(pairwise(firsts))
        ],
        elsewhere,
        found.said,
    )


def _between(share: Share, table: Array, units: NDArray[np.intp]) -> Array:
    """What the blocks of this process add to Σ a_s (k_s − k)², for some units."""
    values = np.zeros(share.units)
    with np.errstate(all="ignore"):
        k = np.where(table[0] == 0, 0.0, table[1] / table[0])
        for here, sums in share.pieces:
            a, e, _, _ = sums.table.numpy(force=True)
            own = np.where(a == 0, 0.0, e / a)
            values[here] += a * (own - k[here]) ** 2
    return values[units]
