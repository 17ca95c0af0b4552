"""What the GPU does for low-rank updates, planned once for the same factors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import triton

from dora_dynamics._kernels.recent import Recent
from dora_dynamics._kernels.sums import on_device
from dora_dynamics._kernels.triton_gather import Gathering, gathering
from dora_dynamics._kernels.triton_low_rank_again import Again, launches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dora_dynamics._kernels.low_rank_update import LowRankUpdate

ENTRY: Final = 11
"""Numbers a site takes in the table, in the order in which the kernel reads them."""
RANKS: Final = (16, 32, 64, 128)
"""What ranks are padded to."""
TILINGS: Final = {
    (True, 16): (64, 128, 4, 3),
    (True, 32): (64, 128, 4, 3),
    (True, 64): (64, 64, 4, 3),
    (True, 128): (128, 64, 8, 3),
    (False, 16): (32, 32, 2, 3),
    (False, 32): (32, 32, 2, 3),
    (False, 64): (64, 64, 4, 3),
    (False, 128): (64, 32, 4, 3),
}
"""By `Kind.is_split` and rank: units and features of a tile, warps, and tiles in flight."""
PORTION: Final = 1 << 23
"""Elements of A, or of B, that one launch takes."""


@dataclass(frozen=True)
class Kind:
    """What the kernel is compiled for: dtypes of W_0, A and B, padded rank, layout of W_0."""

    before: torch.dtype
    A: torch.dtype
    B: torch.dtype
    rank: int
    by_column: bool

    @property
    def is_split(self) -> bool:
        """Whether A is multiplied in three parts of bfloat16."""
        return self.before == torch.bfloat16

    @property
    def tiling(self) -> tuple[int, int, int, int]:
        """Units and features of a tile, warps, and tiles in flight."""
        return TILINGS[self.is_split, self.rank]


def fits(update: LowRankUpdate) -> bool:
    """Whether the kernel was made for it."""
    before = update.before
    return (
        before.dtype != torch.float64
        and update.A.shape[0] <= max(RANKS)
        and 1 in before.stride()
        and update.A.device == update.B.device == before.device
    )


def kind_of(update: LowRankUpdate) -> Kind:
    """Its kind."""
    before, A, B = update.before, update.A, update.B
    rank = triton.next_power_of_2(max(A.shape[0], min(RANKS)))
    by_column = before.stride(1) != 1 and before.stride(0) == 1
    return Kind(before.dtype, A.dtype, B.dtype, rank, by_column)


@dataclass(frozen=True)
class Portion:
    """One launch, for updates of one kind, those of one shape side by side.

    Attributes:
        kind: what they have in common.
        first_unit: where their sums begin.
        shapes: how many there are of each shape of A and B, in their order.
        A: the copy of their A.
        B: the copy of their B.
        table: `ENTRY` numbers an update, on the device.
        owners: the update of each program, on the device.
        aligned: whether addresses and lengths are multiples of 16.
    """

    kind: Kind
    first_unit: int
    shapes: dict[tuple[torch.Size, torch.Size], int]
    A: Gathering
    B: Gathering
    table: Tensor
    owners: Tensor
    aligned: bool


@dataclass(frozen=True)
class Plan:
    """The launches that sum some updates, and where the sums of each start.

    It refers to no weight and no factor but by address.

    Attributes:
        portions: the launches.
        again: what looks at the sums of all afterwards.
        first_units: of each update, in the order given.
        total: units of all.
        scalings: of each update, float64, on the device.
        laid: scaling and units of each update in the order of the sums, likewise, shape (2, n).
    """

    portions: tuple[Portion, ...]
    again: tuple[Again, ...]
    first_units: tuple[int, ...]
    total: int
    scalings: Tensor
    laid: Tensor


_plans: Recent[Plan] = Recent()


def plan_of(updates: Sequence[LowRankUpdate]) -> Plan:
    """The plan for these: made once, then known again by addresses, shapes and strides."""
    key = tuple(
        (u.scaling, *((t.dtype, t.data_ptr(), t.shape, t.stride()) for t in (u.before, u.A, u.B)))
        for u in updates
    )
    return _plans.get((updates[0].before.device, key), lambda: make_plan(updates))


def make_plan(updates: Sequence[LowRankUpdate], limit: int = PORTION) -> Plan:
    """Sort the updates into portions of at most `limit` elements, and write the tables."""
    device = updates[0].before.device
    grouped = in_portions(updates, limit)
    order = [i for some in grouped for i in some]
    counts = [updates[i].before.shape[0] for i in order]
    first_of = dict(zip(order, accumulate(counts, initial=0), strict=False))
    first_units = tuple(first_of[i] for i in range(len(updates)))
    scalings = np.array([update.scaling for update in updates], np.float64)
    return Plan(
        portions=tuple(portion_of([updates[i] for i in s], first_of[s[0]]) for s in grouped),
        again=tuple(launches(updates, first_units)),
        first_units=first_units,
        total=sum(counts),
        scalings=on_device(scalings, device),
        laid=on_device(np.array([scalings[order], counts]), device),
    )


def portion_of(updates: Sequence[LowRankUpdate], first_unit: int) -> Portion:
    """The launch for these updates, whose sums begin at a unit."""
    kind, device = kind_of(updates[0]), updates[0].before.device
    tile, *_ = kind.tiling
    table = np.empty((len(updates), ENTRY), np.int64)
    programs = offset = 0
    first = first_unit
    for entry, update in zip(table, updates, strict=True):
        before, A, B = update.before, update.A, update.B
        apart = before.stride(1 if kind.by_column else 0)
        entry[:] = (
            *(before.data_ptr(), B.data_ptr(), *before.shape, A.shape[0], apart),
            *(*B.stride(), programs, first, offset),
        )
        programs += -(-before.shape[0] // tile)
        offset += A.numel()
        first += before.shape[0]
    owners = np.repeat(np.arange(len(updates), dtype=np.int32), np.diff([*table[:, 8], programs]))
    multiples = table[:, [0, 2, 3, 5, 10] if kind.by_column else [0, 3, 5, 10]]
    return Portion(
        kind=kind,
        first_unit=first_unit,
        shapes=dict(Counter((update.A.shape, update.B.shape) for update in updates)),
        A=gathering([update.A for update in updates]),
        B=gathering([update.B for update in updates]),
        table=on_device(table, device),
        owners=on_device(owners, device),
        aligned=bool((multiples % 16 == 0).all()),
    )


def in_portions(updates: Sequence[LowRankUpdate], limit: int) -> list[list[int]]:
    """The positions of all updates, those of one kind and then of one shape side by side, in lists.

    A list holds one kind, and of A and of B at most `limit` elements, or one update.
    """
    alike: dict[Kind, dict[tuple[torch.Size, torch.Size], list[int]]] = {}
    for i, update in enumerate(updates):
        shapes = alike.setdefault(kind_of(update), {})
        shapes.setdefault((update.A.shape, update.B.shape), []).append(i)
    portions: list[list[int]] = []
    for shapes in alike.values():
        held = limit
        for (a_shape, b_shape), members in shapes.items():
            size = max(a_shape.numel(), b_shape.numel())
            for i in members:
                if held + size > limit:
                    portions.append([])
                    held = 0
                portions[-1].append(i)
                held += size
    return portions
