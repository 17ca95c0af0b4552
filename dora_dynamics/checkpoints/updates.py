"""What a checkpoint makes of a base weight, and the change that is.

Three kinds: a weight of its own (`Replaced`), the factors of a low-rank update (`Factors`), and
anything else that is computed for one layer at a time (`Built`). The last two may start from a copy
of the base weight that the checkpoint brings itself (`Rebased`). Large work is cut into blocks of
units, so that memory stays bounded; every number comes from `decomposition`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from dora_dynamics import measurement
from dora_dynamics.decomposition import (
    UnitChange,
    low_rank_change,
    reduce_units,
    weight_change,
)
from dora_dynamics.effective import Dense

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from dora_dynamics.checkpoints.stored import StoredTensor
    from dora_dynamics.decomposition import Axis, WeightChange
    from dora_dynamics.sites.site import Site

_BLOCK_ELEMENTS: Final = 1 << 20
"""Elements of a block: 8 MiB in float64, a few of which are alive at a time."""


@dataclass(frozen=True)
class Replaced:
    """The checkpoint holds the whole weight."""

    tensor: StoredTensor

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors that are read."""
        return (self.tensor,)


@dataclass(frozen=True)
class Factors:
    """A low-rank update in the orientation (out, in), with DoRA's magnitude where it has one.

    Attributes:
        parts: the tensors that are read.
        build: gives A of shape (rank, in) and B of shape (out, rank).
        scaling: the factor on B A.
        magnitude: gives m, one entry per unit of `magnitude_axis`; None for LoRA.
        magnitude_axis: the axis m belongs to: "output" for PEFT, often "input" for LyCORIS.
    """

    parts: tuple[StoredTensor, ...]
    build: Callable[[], tuple[Tensor, Tensor]]
    scaling: float
    magnitude: Callable[[], Tensor] | None = None
    magnitude_axis: Axis = "output"


@dataclass(frozen=True)
class Built:
    """A weight that a function computes from the base weight, one layer at a time.

    Attributes:
        parts: the tensors that are read.
        build: from the base weight as stored, in float64, the effective one as stored.
    """

    parts: tuple[StoredTensor, ...]
    build: Callable[[Tensor, Site], Tensor]


@dataclass(frozen=True)
class Rebased:
    """An update of the weight that the checkpoint keeps below it, beside the update itself.

    PEFT saves so what lies below an adapter on an embedding or an output layer: the base weight
    once more, or one of another vocabulary.

    Attributes:
        start: the weight below the update.
        update: what is done to it.
    """

    start: StoredTensor
    update: Factors | Built

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensors that are read."""
        return (self.start, *self.update.parts)


Update = Replaced | Factors | Built | Rebased


def is_built(update: Update) -> bool:
    """Whether the whole effective weight is built to measure this."""
    return isinstance(update.update if isinstance(update, Rebased) else update, Built)


def change_of(site: Site, base: StoredTensor, update: Update, axis: Axis) -> WeightChange:
    """The change from the base weight to what the checkpoint makes of it."""
    with torch.no_grad():
        if isinstance(update, Replaced):
            return _replaced(site, base, update.tensor, axis)
        weight = base.load()
        if isinstance(update, Rebased):
            start = update.start.load()
            if not _is_copy(start, weight):
                return _rebased(site, weight, start, update.update, axis)
            update = update.update
        if isinstance(update, Built):
            after = update.build(weight.to(torch.float64), site)
            return _in_blocks(site.oriented(weight), site.oriented(after), axis)
        return _low_rank(site, weight, update, axis)


def _replaced(site: Site, base: StoredTensor, other: StoredTensor, axis: Axis) -> WeightChange:
    if other.blocks and base.shape == other.shape and axis == "output" and _units_are_rows(site):
        return _in_stored_blocks(base, other)
    before, after = base.load(), other.load()
    if before.shape != after.shape:
        shared = min(len(before), len(after))
        before, after = before[:shared], after[:shared]
    if before.dtype == after.dtype and not _is_a_slice_of_columns(site):
        return measurement.measure(site, before, Dense(after), axis)
    return _in_blocks(site.oriented(before), site.oriented(after), axis)


def _units_are_rows(site: Site) -> bool:
    whole = site.rows is None and site.expert is None
    return whole and site.kind in ("matrix", "embedding") and not site.stored_transposed


def _in_stored_blocks(base: StoredTensor, other: StoredTensor) -> WeightChange:
    """Of a sharded checkpoint each block of rows by itself, so that none is put together."""
    own = dict(base.blocks)
    whole = base.load() if own.keys() != dict(other.blocks).keys() else None
    parts = []
    for start, load in other.blocks:
        after = load()
        before = own[start]() if whole is None else whole[start : start + len(after)]
        same = before.dtype == after.dtype
        change = weight_change(before, after) if same else _in_blocks(before, after, "output")
        parts.append(change.units)
    return reduce_units(_joined(parts), "output")


def _is_a_slice_of_columns(site: Site) -> bool:
    """Whether the units are some of the columns of the stored tensor: copied row by row first."""
    return site.stored_transposed and site.rows is not None


def _low_rank(site: Site, weight: Tensor, update: Factors, axis: Axis) -> WeightChange:
    A, B = update.build()
    m = update.magnitude() if update.magnitude is not None else None
    own = site.oriented(weight)
    if m is None or update.magnitude_axis == "output":
        if m is None or axis == "output":
            own_m = None if m is None else site.select(m)
            if axis == "output" and _is_a_slice_of_columns(site):
                own = own.contiguous()
            return low_rank_change(
                own, A, site.select(B), scaling=update.scaling, magnitude=own_m, axis=axis
            )
        ratio = _ratio(site.select(m), own, A, site.select(B), update.scaling)
        return _scaled(own.T, site.select(B).T, A.T, update.scaling, ratio, axis)
    matrix = site.matrix(weight)
    if site.rows is None and axis == "input":
        return reduce_units(_low_rank_units(matrix.T, B.T, A.T, update.scaling, m), axis)
    ratio = _ratio(m, matrix.T, B.T, A.T, update.scaling)
    if axis == "output":
        return _scaled(own, A, site.select(B), update.scaling, ratio, axis)
    after = (own + update.scaling * (site.select(B).double() @ A.double())) * ratio
    return _in_blocks(own, after, axis)


def _is_copy(copy: Tensor, weight: Tensor) -> bool:
    """Whether all values are those of `weight`, but for the dtype they are kept in."""
    return copy.shape == weight.shape and all(
        torch.equal(copy[start:stop], weight[start:stop].to(copy.dtype))
        for start, stop in _blocks(weight)
    )


def _rebased(
    site: Site, weight: Tensor, start: Tensor, update: Factors | Built, axis: Axis
) -> WeightChange:
    """The change from `weight` to an updated `start`, over the rows that both have."""
    shared = min(len(weight), len(start))
    before = site.oriented(weight[:shared])
    if isinstance(update, Built):
        after = update.build(start.to(torch.float64), site)
        return _in_blocks(before, site.oriented(after[:shared]), axis)
    A, B = update.build()
    ratio = torch.ones(1, 1, dtype=torch.float64)
    if update.magnitude is not None:
        m, whole = update.magnitude(), site.matrix(start)
        if update.magnitude_axis == "output":
            ratio = site.select(_ratio(m, whole, A, B, update.scaling))[: len(before)].unsqueeze(1)
        else:
            ratio = _ratio(m, whole.T, B.T, A.T, update.scaling).unsqueeze(0)
    start, B = site.oriented(start[:shared]), site.select(B)[: len(before)]
    if axis == "input":
        before, start, A, B, ratio = before.T, start.T, B.T, A.T, ratio.T
    return _scaled(before, A, B, update.scaling, ratio, axis, start)


def _ratio(m: Tensor, matrix: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """DoRA's m over the norm of each row of matrix + scaling · B A; 0 where that is zero."""
    norms = _low_rank_units(matrix, A, B, scaling).magnitude_after
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms != 0)
    return m.to(torch.float64) * torch.from_numpy(inverse)


def _low_rank_units(
    matrix: Tensor, A: Tensor, B: Tensor, scaling: float, m: Tensor | None = None
) -> UnitChange:
    """`low_rank_change` of each row of `matrix`, in blocks laid out by row."""
    room = _Room(matrix, matrix.dtype, 1)
    parts = [
        low_rank_change(
            room.copy(0, matrix[start:stop]),
            A,
            B[start:stop],
            scaling=scaling,
            magnitude=None if m is None else m[start:stop],
        ).units
        for start, stop in _blocks(matrix)
    ]
    return _joined(parts)


def _scaled(
    matrix: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    ratio: Tensor,
    axis: Axis,
    below: Tensor | None = None,
) -> WeightChange:
    """The change of each row of `matrix`, where DoRA scales by `ratio`.

    Args:
        matrix: one unit per row.
        A: shape (rank, columns).
        B: shape (rows, rank).
        scaling: the factor on B A.
        ratio: one for each column, or of a shape that `matrix` can be multiplied by.
        axis: what the units are.
        below: what the update is of, where it is not `matrix` itself.
    """
    below = matrix if below is None else below
    ratio = ratio.expand(matrix.shape)
    A64, B64 = A.to(torch.float64), scaling * B.to(torch.float64)
    room = _Room(matrix, torch.float64, 2)
    parts = []
    for start, stop in _blocks(matrix):
        before = room.copy(0, matrix[start:stop])
        after = torch.matmul(B64[start:stop], A64, out=room.view(1, stop - start))
        after.add_(below[start:stop]).mul_(ratio[start:stop])
        parts.append(weight_change(before, after).units)
    return reduce_units(_joined(parts), axis)


def _in_blocks(before: Tensor, after: Tensor, axis: Axis) -> WeightChange:
    """`weight_change` of weights of different dtypes, block by block in one that holds both."""
    dtype = torch.promote_types(before.dtype, after.dtype)
    if axis == "input":
        before, after = before.T, after.T
    room = _Room(before, dtype, 2)
    parts = [
        weight_change(room.copy(0, before[start:stop]), room.copy(1, after[start:stop])).units
        for start, stop in _blocks(before)
    ]
    return reduce_units(_joined(parts), axis)


class _Room:
    """Memory for blocks of a matrix, used again by each: fresh blocks would fragment the heap."""

    def __init__(self, matrix: Tensor, dtype: torch.dtype, count: int) -> None:
        rows = _blocks(matrix)[0][1]
        self._blocks = torch.empty(count, rows, matrix.shape[1], dtype=dtype)

    def view(self, which: int, rows: int) -> Tensor:
        """The first rows of one of the blocks."""
        return self._blocks[which, :rows]

    def copy(self, which: int, block: Tensor) -> Tensor:
        """A copy of `block` in one of the blocks, laid out by row."""
        return self.view(which, len(block)).copy_(block)


def _blocks(matrix: Tensor) -> list[tuple[int, int]]:
    units = len(matrix)
    rows = max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    return [(start, min(start + rows, units)) for start in range(0, units, rows)]


def _joined(parts: list[UnitChange]) -> UnitChange:
    if len(parts) == 1:
        return parts[0]
    return UnitChange(
        **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(UnitChange)}
    )
