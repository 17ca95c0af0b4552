"""The factors of an adapter on sharded weights: what of them each process needs, and has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dora_dynamics._arrays import is_sharded
from dora_dynamics.effective import LowRank
from dora_dynamics.sharded.collectives import Wanted
from dora_dynamics.sharded.holding import Adapted, held

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from dora_dynamics.decomposition import Axis
    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.sharded.holding import Block
    from dora_dynamics.sites import Site


@dataclass(frozen=True)
class Weight:
    """One tensor to be measured, at some sites.

    Attributes:
        sites: the weight as a whole, or parts of it.
        before: W_0, sharded.
        after: W', or why this process could not read it.
    """

    sites: tuple[Site, ...]
    before: DTensor
    after: EffectiveWeight | Adapted | Exception


@dataclass(frozen=True)
class Form:
    """How W' of a tensor is given, as far as other processes must know it to exchange anything.

    Attributes:
        kind: dense, or by which factors.
        parts: of the factors that some process needs whole, and has a part of only: the name, the
            shape and the type.
        has_norms: whether the norms of the rows below DoRA's m are added up first.
    """

    kind: str
    parts: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    has_norms: bool


def form_of(weight: Weight, axis: Axis) -> Form | None:
    """The form of what this process has read; None where it failed to."""
    if isinstance(weight.after, Exception):
        return None
    factors = factors_of(weight)
    if factors is None:
        return Form("dense", (), has_norms=False)
    kind = "LoRA" if factors.magnitude is None else "DoRA"
    if isinstance(weight.after, Adapted):
        kind += " on another base"
    rows, columns = (1, 0) if weight.sites[0].stored_transposed else (0, 1)
    parts = []
    for name, dimensions in (("A", {columns: 1}), ("B", {rows: 0}), ("magnitude", {})):
        tensor = getattr(factors, name)
        if is_sharded(tensor) and not _suffices(tensor, weight.before, dimensions):
            parts.append((name, tuple(tensor.shape), tensor.dtype))
    return Form(kind, tuple(parts), factors.magnitude is not None and is_built(weight, axis))


def wanted(weight: Weight, form: Form, *, has_part: bool) -> list[Wanted]:
    """What of the factors is to be joined, with the part of it that this process has."""
    factors = factors_of(weight) if has_part else None
    return [
        Wanted(shape, dtype, None if factors is None else getattr(factors, name))
        for name, shape, dtype in form.parts
    ]


def factors_of(weight: Weight) -> LowRank | None:
    """The factors of the adapter, where W' is given by them."""
    after = weight.after
    if isinstance(after, Adapted):
        return after.factors
    return after if isinstance(after, LowRank) else None


def is_built(weight: Weight, axis: Axis) -> bool:
    """Whether the blocks of W' must be built: its factors alone do not tell the change."""
    after = weight.after
    if isinstance(after, Adapted):
        return True
    return isinstance(after, LowRank) and after.magnitude is not None and axis == "input"


def base_of(weight: Weight) -> DTensor:
    """What lies below the adapter."""
    return weight.after.base if isinstance(weight.after, Adapted) else weight.before


def own_factors(block: Block, factors: LowRank, whole: Mapping[str, Tensor]) -> LowRank:
    """The parts of the factors that one block asks for, where it is."""
    rows, device = np.arange(block.row, block.row + len(block.weight)), block.weight.device
    A, B = whole.get("A", factors.A), whole.get("B", factors.B)
    m = whole.get("magnitude", factors.magnitude)
    return LowRank(
        A=_part(A, 1, block.columns).to(device),
        B=_part(B, 0, rows).to(device),
        scaling=factors.scaling,
        magnitude=None if m is None else _part(m, 0, rows).to(device),
    )


def _part(factor: Tensor, dim: int, wanted: NDArray[np.intp]) -> Tensor:
    """The rows or columns `wanted` of a factor, from what this process has of it."""
    tensor, offsets = held(factor)
    first, count = int(wanted[0]) - offsets[dim], len(wanted)
    if int(wanted[-1]) - int(wanted[0]) + 1 == count:
        return tensor.narrow(dim, first, count)
    index = torch.from_numpy(wanted - offsets[dim]).to(tensor.device)
    return tensor.index_select(dim, index)


def _suffices(factor: DTensor, weight: DTensor, dimensions: Mapping[int, int]) -> bool:
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


def by_tensor(weights: Sequence[tuple[Site, DTensor, EffectiveWeight | Adapted]]) -> list[Weight]:
    """Sites that follow each other and are of one tensor, together."""
    found: list[Weight] = []
    for site, before, after in weights:
        last = found[-1] if found else None
        if last is not None and last.after is after and last.before is before:
            found[-1] = Weight((*last.sites, site), before, after)
        else:
            found.append(Weight((site,), before, after))
    return found
