"""What this process knows of the sums of each site: those of the blocks that it holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from dora_dynamics._arrays import is_sharded
from dora_dynamics._kernels import LowRankUpdate, UnitSums, dense_sums_of_all, low_rank_sums_of_all
from dora_dynamics.effective import Dense, LowRank, built
from dora_dynamics.sharded.adapted import base_of, factors_of, is_built, own_factors
from dora_dynamics.sharded.holding import Block, ShardingError, blocks, same_place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from dora_dynamics.decomposition import Axis
    from dora_dynamics.sharded.adapted import Weight
    from dora_dynamics.sites import Site

    Array = NDArray[np.float64]
    Units = slice | NDArray[np.intp]


@dataclass(frozen=True)
class Share:
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


@dataclass(frozen=True)
class _Plan:
    """The blocks of one site that this process holds, and what is to be summed of each."""

    own: list[Block]
    summands: list[tuple[Tensor, Tensor] | LowRankUpdate | UnitSums]


def shares_of(
    weights: Sequence[Weight],
    whole: Sequence[Mapping[str, Tensor]],
    norms: Sequence[Sequence[Array] | None],
    failures: dict[int, Exception],
    axis: Axis,
) -> list[list[Share]]:
    """The shares of each site of each weight: all weights of a device summed together.

    Args:
        weights: what is measured.
        whole: of each, the factors that were joined.
        norms: of each, for each site, the norms of the rows below DoRA's m where they are needed.
        failures: the weights that this process could not read, by position; those that it cannot
            sum are added. They have no part in their sums.
        axis: which axis the units are.
    """
    plans: dict[int, list[_Plan]] = {}
    for i, weight in enumerate(weights):
        if i in failures:
            continue
        own_norms: Sequence[Array | None] = norms[i] or [None] * len(weight.sites)
        try:
            plans[i] = [
                _plan(weight, site, whole[i], own, axis)
                for site, own in zip(weight.sites, own_norms, strict=True)
            ]
        except Exception as error:
            failures[i] = error
    sums: dict[int, list[list[UnitSums]]] = {}
    try:
        sums = dict(zip(plans, _sums_of(list(plans.values())), strict=True))
    except Exception:  # of which weight, that does not tell
        for i, plan in plans.items():
            try:
                (sums[i],) = _sums_of([plan])
            except Exception as error:
                failures[i] = error
    return [
        [
            _share(weight, site, plan.own, its_sums, axis)
            for site, plan, its_sums in zip(weight.sites, plans[i], sums[i], strict=True)
        ]
        if i in sums
        else [_share(weight, site, [], [], axis) for site in weight.sites]
        for i, weight in enumerate(weights)
    ]


def squared_norms(weight: Weight, site: Site, whole: Mapping[str, Tensor]) -> tuple[Array, int]:
    """What this process has of ‖base + s·B A‖² of each row of a site, and of how many elements."""
    factors = factors_of(weight)
    assert factors is not None
    squares, count = np.zeros(site.extent(weight.before.shape)[0]), 0
    for block in blocks(site, base_of(weight)):
        own = replace(own_factors(block, factors, whole), magnitude=None)
        turned = built(block.weight, own)
        here = slice(block.unit, block.unit + len(turned))
        squares[here] += torch.einsum("nk,nk->n", turned, turned).numpy(force=True)
        count += turned.numel()
    return squares, count


def _plan(
    weight: Weight, site: Site, whole: Mapping[str, Tensor], norms: Array | None, axis: Axis
) -> _Plan:
    """The blocks of a site before and after, oriented; those of W' built where that is needed."""
    own = blocks(site, weight.before)
    summands: list[tuple[Tensor, Tensor] | LowRankUpdate | UnitSums] = []
    if is_built(weight, axis):
        for before, base in zip(own, blocks(site, base_of(weight)), strict=True):
            after = _built(base, weight, whole, norms)
            pair = _oriented(before.weight.to(after.dtype), after, axis)
            summands += dense_sums_of_all([pair])
    elif isinstance(weight.after, LowRank):
        for block in own:
            factors = own_factors(block, weight.after, whole)
            update = LowRankUpdate(block.weight, factors.A, factors.B, factors.scaling)
            summands.append(update if axis == "output" else update.transposed)
    else:
        for before, now in zip(own, _dense_blocks(weight, site), strict=True):
            common = torch.promote_types(before.weight.dtype, now.weight.dtype)
            w_0 = before.weight.to(now.weight.device, common)
            summands.append(_oriented(w_0, now.weight.to(common), axis))
    return _Plan(own, summands)


def _built(
    block: Block, weight: Weight, whole: Mapping[str, Tensor], norms: Array | None
) -> Tensor:
    """The block of W' that an adapter applies, in float64 as an unsharded one is."""
    factors = factors_of(weight)
    assert factors is not None
    norm = None
    if norms is not None:
        norm = torch.from_numpy(norms[block.unit : block.unit + len(block.weight)])
        norm = norm.to(block.weight.device)
    return built(block.weight, own_factors(block, factors, whole), norm)


def _oriented(before: Tensor, after: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    return (before, after) if axis == "output" else (before.T, after.T)


def _dense_blocks(weight: Weight, site: Site) -> list[Block]:
    assert isinstance(weight.after, Dense)
    now = weight.after.weight
    if (
        not is_sharded(now)
        or now.shape != weight.before.shape
        or not same_place(weight.before, now)
    ):
        raise ShardingError(
            f"{site.name} is not sharded as it was when the baseline was taken: record at "
            "an optimizer's step, and shard the model before the recorder is attached."
        )
    return blocks(site, now)


def _sums_of(weights: Sequence[Sequence[_Plan]]) -> list[list[list[UnitSums]]]:
    """The sums of each block of each site of some weights."""
    every = [summand for plans in weights for plan in plans for summand in plan.summands]
    dense = [summand for summand in every if isinstance(summand, tuple)]
    low_rank = [summand for summand in every if isinstance(summand, LowRankUpdate)]
    dense_sums, low_rank_sums = iter(dense_sums_of_all(dense)), iter(low_rank_sums_of_all(low_rank))

    def of(summand: tuple[Tensor, Tensor] | LowRankUpdate | UnitSums) -> UnitSums:
        if isinstance(summand, UnitSums):
            return summand
        return next(dense_sums if isinstance(summand, tuple) else low_rank_sums)

    return [[[of(summand) for summand in plan.summands] for plan in plans] for plans in weights]


def _share(weight: Weight, site: Site, own: list[Block], sums: list[UnitSums], axis: Axis) -> Share:
    rows, columns = site.extent(weight.before.shape)
    along = axis == "output"
    pieces: list[tuple[Units, UnitSums]] = []
    split = False
    for block, block_sums in zip(own, sums, strict=True):
        here = slice(block.unit, block.unit + len(block.weight))
        pieces.append((here if along else block.columns, block_sums))
        split |= block.weight.shape[1 if along else 0] < (columns if along else rows)
    return Share(
        units=rows if along else columns,
        elements=rows * columns,
        pieces=pieces,
        held=sum(block.weight.numel() for block in own),
        is_split=split,
    )
