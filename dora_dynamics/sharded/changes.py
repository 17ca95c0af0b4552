"""The change of each unit of sharded weights, from the blocks that each process holds.

A block's own sums a_s, e_s, c_s and P_s add up over blocks, but for P: with k_s = e_s/a_s,
P = Σ P_s + Σ a_s (k_s − k)². Where units lie whole on one process the second sum is zero. Where
they are split, P = c − e²/a, and only where that cancels (an almost radial change) the second sum
is taken as it stands: one more all-reduce of these units, no weight read again.

On a GPU a record waits for the device: for the sums of all blocks, which come over together, and
for each all-reduce; and for each weight that has to be built (PiSSA's, DoRA's along the input).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from dora_dynamics._arrays import is_sharded
from dora_dynamics._kernels import LowRankUpdate, UnitSums, dense_sums_of_all, low_rank_sums_of_all
from dora_dynamics._kernels.sums import TANGENTIAL_SHARE, from_array
from dora_dynamics.decomposition import UnitChange, _rescale, unit_change
from dora_dynamics.effective import Dense, LowRank, built
from dora_dynamics.sharded.collectives import added, device_of, joined
from dora_dynamics.sharded.holding import (
    Adapted,
    Block,
    ShardingError,
    blocks,
    held,
    same_place,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from dora_dynamics.decomposition import Axis
    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.sites import Site

    Array = NDArray[np.float64]
    Units = slice | NDArray[np.intp]


@dataclass(frozen=True)
class Weight:
    """One site to be measured.

    Attributes:
        site: the weight, or the part of one.
        before: W_0, sharded.
        after: W'.
    """

    site: Site
    before: DTensor
    after: EffectiveWeight | Adapted


@dataclass(frozen=True)
class _Share:
    """What this process knows of the sums of one site.

    Attributes:
        units: how many units the site has.
        elements: how many elements.
        pieces: the units of each block, and their sums over what the block holds of them.
        held: how many elements the blocks have.
        is_split: whether a block holds a part of its units only.
    """

    units: int
    elements: int
    pieces: list[tuple[Units, UnitSums]]
    held: int
    is_split: bool


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
        ShardingError: a weight is not held whole by the processes together.
        ValueError: an adapter's factors do not fit the weight.
    """
    given = [Weight(*weight) for weight in weights]
    device = device_of(given[0].before)
    whole = _whole_factors(given)
    norms = _turned_norms(given, whole, axis, device)
    shares = _shares(given, whole, norms, axis)
    sums = _sums(shares, device)
    changes = []
    for weight, site_sums in zip(given, sums, strict=True):
        factors = weight.after
        if isinstance(factors, LowRank) and factors.magnitude is not None and axis == "output":
            m, _ = held(whole.get(id(factors.magnitude), factors.magnitude))
            own = weight.site.select(m).detach().to("cpu", torch.float64)
            changes.append(_rescale(site_sums, own))
        else:
            changes.append(unit_change(site_sums))
    return changes


def mean_magnitudes(weights: Sequence[tuple[Site, DTensor]], axis: Axis) -> list[float]:
    """Mean magnitude of the units of each site; all processes call this."""
    same = [(site, weight, Dense(weight)) for site, weight in weights]
    return [float(change.magnitude_before.mean()) for change in unit_changes(same, axis)]


def _factors(weight: Weight) -> LowRank | None:
    after = weight.after
    if isinstance(after, Adapted):
        return after.factors
    return after if isinstance(after, LowRank) else None


def _is_built(weight: Weight, axis: Axis) -> bool:
    """Whether the blocks of W' must be built: its factors alone do not tell the change."""
    after = weight.after
    if isinstance(after, Adapted):
        return True
    return isinstance(after, LowRank) and after.magnitude is not None and axis == "input"


def _whole_factors(weights: Sequence[Weight]) -> dict[int, Tensor]:
    """The factors that this process needs and has a part of only, whole, by their `id`."""
    needed: dict[int, DTensor] = {}
    for weight in weights:
        factors = _factors(weight)
        if factors is None:
            continue
        rows, columns = (1, 0) if weight.site.stored_transposed else (0, 1)
        for tensor, dimensions in (
            (factors.A, {columns: 1}),
            (factors.B, {rows: 0}),
            (factors.magnitude, {}),
        ):
            if is_sharded(tensor) and not _suffices(tensor, weight.before, dimensions):
                needed[id(tensor)] = tensor
    return dict(zip(needed, joined(list(needed.values())), strict=True))


def _suffices(factor: DTensor, weight: DTensor, dimensions: dict[int, int]) -> bool:
    """Whether each process holds of a factor what the blocks of the weight ask for.

    That depends on the placements alone, so that all processes find the same.

    Args:
        factor: a factor of the adapter.
        weight: the weight that it adapts.
        dimensions: which dimension of the weight runs along which one of the factor.
    """
    if all(placement.is_replicate() for placement in factor.placements):
        return True
    if factor.device_mesh != weight.device_mesh:
        return False
    for mine, its in zip(factor.placements, weight.placements, strict=True):
        if mine.is_replicate():
            continue
        along = dimensions.get(getattr(its, "dim", -1))
        if type(mine) is not type(its) or getattr(mine, "dim", None) != along:
            return False
        if getattr(mine, "split_factor", 1) != getattr(its, "split_factor", 1):
            return False
    return True


def _part(factor: Tensor, whole: dict[int, Tensor], dim: int, wanted: NDArray[np.intp]) -> Tensor:
    """The rows or columns `wanted` of a factor, from what this process has of it."""
    tensor, offsets = held(whole.get(id(factor), factor))
    first, count = int(wanted[0]) - offsets[dim], len(wanted)
    if int(wanted[-1]) - int(wanted[0]) + 1 == count:
        return tensor.narrow(dim, first, count)
    index = torch.from_numpy(wanted - offsets[dim]).to(tensor.device)
    return tensor.index_select(dim, index)


def _own_factors(block: Block, factors: LowRank, whole: dict[int, Tensor]) -> LowRank:
    """The parts of the factors that one block asks for, where it is."""
    rows, device = np.arange(block.row, block.row + len(block.weight)), block.weight.device
    m = factors.magnitude
    return LowRank(
        A=_part(factors.A, whole, 1, block.columns).to(device),
        B=_part(factors.B, whole, 0, rows).to(device),
        scaling=factors.scaling,
        magnitude=None if m is None else _part(m, whole, 0, rows).to(device),
    )


def _base(weight: Weight) -> DTensor:
    return weight.after.base if isinstance(weight.after, Adapted) else weight.before


def _turned_norms(
    weights: Sequence[Weight], whole: dict[int, Tensor], axis: Axis, device: torch.device
) -> dict[int, Array]:
    """‖base + s·B A‖ of each row of the DoRA weights that must be built, by position."""
    found: dict[int, tuple[Array, int, int]] = {}
    for i, weight in enumerate(weights):
        factors = _factors(weight)
        if factors is None or factors.magnitude is None or not _is_built(weight, axis):
            continue
        rows, columns = weight.site.extent(weight.before.shape)
        squares, count = np.zeros(rows), 0
        for block in blocks(weight.site, _base(weight)):
            own = replace(_own_factors(block, factors, whole), magnitude=None)
            turned = built(block.weight, own)
            here = slice(block.unit, block.unit + len(turned))
            squares[here] += torch.einsum("nk,nk->n", turned, turned).numpy(force=True)
            count += turned.numel()
        found[i] = squares, count, rows * columns
    if not found:
        return {}
    vectors, counts, elements = zip(*found.values(), strict=True)
    totals = added(vectors, counts, elements, device)
    return {i: np.sqrt(total) for i, total in zip(found, totals, strict=True)}


def _built(block: Block, weight: Weight, whole: dict[int, Tensor], norms: Array | None) -> Tensor:
    """The block of W' that an adapter applies, in float64 as an unsharded one is."""
    factors = _factors(weight)
    assert factors is not None
    norm = None
    if norms is not None:
        norm = torch.from_numpy(norms[block.unit : block.unit + len(block.weight)])
        norm = norm.to(block.weight.device)
    return built(block.weight, _own_factors(block, factors, whole), norm)


def _shares(
    weights: Sequence[Weight], whole: dict[int, Tensor], norms: dict[int, Array], axis: Axis
) -> list[_Share]:
    """What this process holds of each site, summed: all weights of a device together."""
    dense: list[tuple[Tensor, Tensor]] = []
    low_rank: list[LowRankUpdate] = []
    plans: list[list[tuple[str, int]]] = []
    found = [blocks(weight.site, weight.before) for weight in weights]
    alone: list[UnitSums] = []
    for i, (weight, own) in enumerate(zip(weights, found, strict=True)):
        plan = []
        if _is_built(weight, axis):
            below = blocks(weight.site, _base(weight))
            for before, base in zip(own, below, strict=True):
                after = _built(base, weight, whole, norms.get(i))
                pair = _oriented(before.weight.to(after.dtype), after, axis)
                plan.append(("alone", len(alone)))
                alone += dense_sums_of_all([pair])
        elif isinstance(weight.after, LowRank):
            for block in own:
                factors = _own_factors(block, weight.after, whole)
                update = LowRankUpdate(block.weight, factors.A, factors.B, factors.scaling)
                if axis == "input":
                    update = LowRankUpdate(update.before.T, update.B.T, update.A.T, update.scaling)
                plan.append(("low rank", len(low_rank)))
                low_rank.append(update)
        else:
            after_blocks = _dense_blocks(weight)
            for before, now in zip(own, after_blocks, strict=True):
                plan.append(("dense", len(dense)))
                common = torch.promote_types(before.weight.dtype, now.weight.dtype)
                w_0 = before.weight.to(now.weight.device, common)
                dense.append(_oriented(w_0, now.weight.to(common), axis))
        plans.append(plan)
    sums = {
        "alone": alone,
        "dense": dense_sums_of_all(dense),
        "low rank": low_rank_sums_of_all(low_rank),
    }
    return [
        _share(weight, own, [sums[kind][i] for kind, i in plan], axis)
        for weight, own, plan in zip(weights, found, plans, strict=True)
    ]


def _oriented(before: Tensor, after: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    return (before, after) if axis == "output" else (before.T, after.T)


def _dense_blocks(weight: Weight) -> list[Block]:
    assert isinstance(weight.after, Dense)
    now = weight.after.weight
    if (
        not is_sharded(now)
        or now.shape != weight.before.shape
        or not same_place(weight.before, now)
    ):
        raise ShardingError(
            f"{weight.site.name} is not sharded as it was when the baseline was taken: record at "
            "an optimizer's step, and shard the model before the recorder is attached."
        )
    return blocks(weight.site, now)


def _share(weight: Weight, own: list[Block], sums: list[UnitSums], axis: Axis) -> _Share:
    rows, columns = weight.site.extent(weight.before.shape)
    pieces: list[tuple[Units, UnitSums]] = []
    split = False
    for block, block_sums in zip(own, sums, strict=True):
        here = slice(block.unit, block.unit + len(block.weight))
        pieces.append((here if axis == "output" else block.columns, block_sums))
        split |= block.weight.shape[1 if axis == "output" else 0] < (
            columns if axis == "output" else rows
        )
    return _Share(
        units=rows if axis == "output" else columns,
        elements=rows * columns,
        pieces=pieces,
        held=sum(block.weight.numel() for block in own),
        is_split=split,
    )


def _sums(shares: Sequence[_Share], device: torch.device) -> list[UnitSums]:
    """The sums of each site over all processes, by one all-reduce and, seldom, a second."""
    vectors = []
    for share in shares:
        vector = np.zeros(4 * share.units + 1)
        table = vector[:-1].reshape(4, share.units)
        for units, sums in share.pieces:
            for row, values in zip(table, _arrays(sums), strict=True):
                row[units] += values
        vector[-1] = share.is_split
        vectors.append(vector)
    held_elements, elements = [s.held for s in shares], [s.elements for s in shares]
    totals = added(vectors, held_elements, elements, device)
    tables = [total[:-1].reshape(4, -1) for total in totals]
    doubtful: dict[int, NDArray[np.intp]] = {}
    for i, (table, total) in enumerate(zip(tables, totals, strict=True)):
        if total[-1] == 0:
            continue  # each unit lies whole on a process, which knows its P
        a, e, c, P = table
        with np.errstate(all="ignore"):
            simple = c - np.where(a == 0, 0.0, e * e / a)
        trusted = TANGENTIAL_SHARE * c <= simple
        P[trusted] = simple[trusted]
        if not trusted.all():
            doubtful[i] = np.flatnonzero(~trusted)
    if doubtful:  # found in what all processes have alike: all come here, or none
        between = [_between(shares[i], tables[i], units) for i, units in doubtful.items()]
        more = added(
            between,
            [held_elements[i] for i in doubtful],
            [elements[i] for i in doubtful],
            device,
        )
        for (i, units), extra in zip(doubtful.items(), more, strict=True):
            tables[i][3, units] += extra
    return [from_array(table) for table in tables]


def _between(share: _Share, table: Array, units: NDArray[np.intp]) -> Array:
    """What the blocks of this process add to Σ a_s (k_s − k)², for some units."""
    values = np.zeros(share.units)
    with np.errstate(all="ignore"):
        k = np.where(table[0] == 0, 0.0, table[1] / table[0])
        for here, sums in share.pieces:
            a, e, _, _ = _arrays(sums)
            own = np.where(a == 0, 0.0, e / a)
            values[here] += a * (own - k[here]) ** 2
    return values[units]


def _arrays(sums: UnitSums) -> tuple[Array, Array, Array, Array]:
    a, e, c, P = (
        t.numpy(force=True)
        for t in (sums.before_square, sums.dot, sums.update_square, sums.tangential_square)
    )
    return a, e, c, P
