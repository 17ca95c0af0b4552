"""The GPU path: every weight of a model in one launch, over a table of addresses.

A program sums a few units of one weight: float32 terms, float32 sums of 64 of them a lane and
float64 beyond, checked at the end. Where these cannot be believed (see `sums.fill_tangential`), the
program sums its units again in float64 while they are still in the GPU's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from dora_dynamics._kernels.recent import Recent
from dora_dynamics._kernels.sums import (
    LARGEST,
    SMALLEST,
    TANGENTIAL_SHARE,
    UnitSums,
    from_array,
    on_device,
    to_host,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_ENTRY: Final = 10
"""Numbers a weight takes in the table, in the order in which the kernel reads them."""
_TYPES: Final = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_LANE: Final = 64
"""Terms a lane adds in float32; float64 beyond. Then a unit's sums are right to 3e-7 at worst."""
_WIDE: Final = 16384
"""Bytes of a row from which two warps share it."""


@dataclass(frozen=True)
class Layout:
    """What the kernel is compiled for: dtype, the dimension that lies contiguous, alignment."""

    dtype: torch.dtype
    by_column: bool
    contiguous: bool
    aligned: bool


@dataclass(frozen=True)
class Tiling:
    """How a program walks its units.

    Attributes:
        units: units a program sums.
        features: features it reads at a time.
        unroll: such readings in flight at once.
        warps: warps of a program.
    """

    units: int
    features: int
    unroll: int
    warps: int


@dataclass(frozen=True)
class Launch:
    """One launch, for all weights of one layout.

    Attributes:
        layout: what they have in common.
        tiling: how its programs walk them.
        whole: whether features come in whole tiles, so that none is masked.
        table: `_ENTRY` numbers a weight, on the device.
        owners: the weight of each program, on the device.
    """

    layout: Layout
    tiling: Tiling
    whole: bool
    table: Tensor
    owners: Tensor


@dataclass(frozen=True)
class Plan:
    """The launches that sum some pairs of weights, and where each pair's sums start."""

    launches: tuple[Launch, ...]
    first_units: tuple[int, ...]
    total: int


def _dense_kernel(
    table: tl.tensor,
    owners: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    DTYPE: tl.constexpr,
    SUM: tl.constexpr,
    SINGLE: tl.constexpr,
    ENTRY: tl.constexpr,
    UNITS: tl.constexpr,
    FEATURES: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
    SHARE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    entry = table + tl.load(owners + program).to(tl.int64) * ENTRY
    before = tl.load(entry).to(tl.pointer_type(DTYPE))
    after = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    units = tl.load(entry + 2).to(tl.int32)
    features = tl.load(entry + 3).to(tl.int32)
    before_unit = tl.load(entry + 4)
    after_unit = tl.load(entry + 5)
    before_feature = tl.load(entry + 6)
    after_feature = tl.load(entry + 7)
    first_program = tl.load(entry + 8).to(tl.int32)
    first_unit = tl.load(entry + 9)
    if ALIGNED:
        before = tl.multiple_of(before, 16)
        after = tl.multiple_of(after, 16)
        if BY_COLUMN:
            units = tl.multiple_of(units, 16)
            before_feature = tl.multiple_of(before_feature, 16)
            after_feature = tl.multiple_of(after_feature, 16)
        else:
            features = tl.multiple_of(features, 16)
            before_unit = tl.multiple_of(before_unit, 16)
            after_unit = tl.multiple_of(after_unit, 16)
    if CONTIGUOUS:
        if BY_COLUMN:
            before_unit = 1
            after_unit = 1
        else:
            before_feature = 1
            after_feature = 1

    unit = (program - first_program) * UNITS + tl.arange(0, UNITS)
    inside = unit < units
    column = tl.arange(0, FEATURES)
    w_rows = before + (unit.to(tl.int64) * before_unit)[:, None]
    v_rows = after + (unit.to(tl.int64) * after_unit)[:, None]
    a_sum = tl.zeros((UNITS,), tl.float64)
    e_sum = tl.zeros((UNITS,), tl.float64)
    c_sum = tl.zeros((UNITS,), tl.float64)
    for top in tl.range(0, features, CHUNK):
        a = tl.zeros((UNITS, FEATURES), SUM)
        e = tl.zeros((UNITS, FEATURES), SUM)
        c = tl.zeros((UNITS, FEATURES), SUM)
        bottom = tl.minimum(top + CHUNK, features)
        for start in tl.range(top, bottom, FEATURES, loop_unroll_factor=UNROLL):
            k = start + column
            mask = inside[:, None] if WHOLE else inside[:, None] & (k < features)[None, :]
            w = tl.load(w_rows + (k * before_feature)[None, :], mask=mask, other=0.0).to(SUM)
            d = tl.load(v_rows + (k * after_feature)[None, :], mask=mask, other=0.0).to(SUM) - w
            a += w * w
            e += d * w
            c += d * d
        a_sum += tl.sum(a, 1).to(tl.float64)
        e_sum += tl.sum(e, 1).to(tl.float64)
        c_sum += tl.sum(c, 1).to(tl.float64)
    tangential = c_sum - tl.where(a_sum == 0.0, 0.0, e_sum * e_sum / a_sum)
    trusted = tangential >= SHARE * c_sum
    if SINGLE:
        unchanged = (c_sum == 0.0) & (e_sum == 0.0)
        trusted = trusted & (a_sum >= SMALL) & (a_sum <= LARGE)
        trusted = trusted & (((c_sum >= SMALL) & (c_sum <= LARGE)) | unchanged)
    slot = out + first_unit + unit
    tl.store(slot, a_sum, mask=inside)
    tl.store(slot + total, e_sum, mask=inside)
    tl.store(slot + 2 * total, c_sum, mask=inside)
    tl.store(slot + 3 * total, tangential, mask=inside)

    again = inside & (trusted == 0)
    if tl.max(again.to(tl.int32), 0) > 0:
        a64 = tl.zeros((UNITS, FEATURES), tl.float64)
        e64 = tl.zeros((UNITS, FEATURES), tl.float64)
        c64 = tl.zeros((UNITS, FEATURES), tl.float64)
        for start in tl.range(0, features, FEATURES):
            k = start + column
            mask = again[:, None] & (k < features)[None, :]
            w = tl.load(w_rows + (k * before_feature)[None, :], mask=mask, other=0.0)
            d = tl.load(v_rows + (k * after_feature)[None, :], mask=mask, other=0.0)
            x = w.to(tl.float64)
            y = d.to(tl.float64) - x
            a64 += x * x
            e64 += y * x
            c64 += y * y
        a_sum = tl.sum(a64, 1)
        e_sum = tl.sum(e64, 1)
        c_sum = tl.sum(c64, 1)
        along = tl.where(a_sum == 0.0, 0.0, e_sum / a_sum)
        p64 = tl.zeros((UNITS, FEATURES), tl.float64)
        for start in tl.range(0, features, FEATURES):
            k = start + column
            mask = again[:, None] & (k < features)[None, :]
            w = tl.load(w_rows + (k * before_feature)[None, :], mask=mask, other=0.0)
            d = tl.load(v_rows + (k * after_feature)[None, :], mask=mask, other=0.0)
            x = w.to(tl.float64)
            p = d.to(tl.float64) - x - along[:, None] * x
            p64 += p * p
        tl.store(slot, a_sum, mask=again)
        tl.store(slot + total, e_sum, mask=again)
        tl.store(slot + 2 * total, c_sum, mask=again)
        tl.store(slot + 3 * total, tl.sum(p64, 1), mask=again)


dense_kernel: Any = triton.jit(_dense_kernel)


def tiling_of(layout: Layout, features: int) -> Tiling:
    """The tiling found fastest on an H200 for weights of up to so many features.

    A warp reads 16 bytes a lane at a time: one warp a row for narrow rows, two for wide ones.
    """
    wide = max(1, layout.dtype.itemsize // 2)
    if layout.by_column:
        return Tiling(units=128 // wide, features=8, unroll=2, warps=4)
    if not layout.contiguous:
        return Tiling(units=16, features=64, unroll=1, warps=4)
    if features * layout.dtype.itemsize < _WIDE:
        return Tiling(units=1, features=256 // wide, unroll=3, warps=1)
    return Tiling(units=1, features=512 // wide, unroll=4, warps=2)


def layout_of(before: Tensor, after: Tensor) -> Layout:
    """The most specific layout that holds for both weights, shape (units, features)."""
    units, features = before.shape
    pair = (before, after)
    by_row = features == 1 or all(weight.stride(1) == 1 for weight in pair)
    by_column = not by_row and all(weight.stride(0) == 1 for weight in pair)
    length, apart = (units, 1) if by_column else (features, 0)
    aligned = length % 16 == 0 and all(
        weight.data_ptr() % 16 == 0 and weight.stride(apart) % 16 == 0 for weight in pair
    )
    return Layout(before.dtype, by_column, by_row or by_column, aligned and (by_row or by_column))


_plans: Recent[Plan] = Recent()


def sums_of_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[UnitSums]:
    """Sums of all pairs, all on one device: a launch per layout, one transfer, one wait."""
    return queue(pairs)()


def queue(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], list[UnitSums]]:
    """Queue what `sums_of_all` waits for; what is returned waits for it."""
    sums, units = start(pairs)
    wait = to_host(sums)
    ends = [0, *accumulate(units)]

    def finish() -> list[UnitSums]:
        host = wait()
        return [from_array(host[:, first:end]) for first, end in pairwise(ends)]

    return finish


def start(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[int]]:
    """Queue the launches; the sums will be in the returned tensor, (4, units of all pairs)."""
    plan = plan_of(pairs)
    sums = torch.empty((4, plan.total), dtype=torch.float64, device=pairs[0][0].device)
    run(plan, sums)
    return sums, np.diff([*plan.first_units, plan.total]).tolist()


def run(plan: Plan, sums: Tensor) -> None:
    """Queue the launches of a plan, which fill `sums`, shape (4, plan.total)."""
    with torch.cuda.device(sums.device):
        for launch in plan.launches:
            layout, tiling = launch.layout, launch.tiling
            dense_kernel[(len(launch.owners),)](
                launch.table,
                launch.owners,
                sums,
                plan.total,
                DTYPE=element_type(layout.dtype),
                SUM=tl.float64 if layout.dtype == torch.float64 else tl.float32,
                SINGLE=layout.dtype != torch.float64,
                ENTRY=_ENTRY,
                UNITS=tiling.units,
                FEATURES=tiling.features,
                CHUNK=_LANE * tiling.features,
                UNROLL=tiling.unroll,
                BY_COLUMN=layout.by_column,
                CONTIGUOUS=layout.contiguous,
                ALIGNED=layout.aligned,
                WHOLE=launch.whole,
                SMALL=SMALLEST,
                LARGE=LARGEST,
                SHARE=TANGENTIAL_SHARE,
                num_warps=tiling.warps,
            )


def plan_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Plan:
    """The plan for these pairs: made once, then known again by addresses, shapes and strides."""
    key = tuple(
        (w.dtype, w.data_ptr(), v.data_ptr(), w.shape, w.stride(), v.stride()) for w, v in pairs
    )
    return _plans.get((pairs[0][0].device, key), lambda: make_plan(pairs))


def make_plan(pairs: Sequence[tuple[Tensor, Tensor]], tiling: Tiling | None = None) -> Plan:
    """Group pairs by layout and write the tables; `tiling` replaces the chosen one."""
    first_units = [0, *accumulate(before.shape[0] for before, _ in pairs)]
    groups: dict[Layout, list[int]] = {}
    for i, (before, after) in enumerate(pairs):
        groups.setdefault(layout_of(before, after), []).append(i)
    launches = []
    for layout, members in groups.items():
        widest = max(pairs[i][0].shape[1] for i in members)
        chosen = tiling or tiling_of(layout, widest)
        table = np.empty((len(members), _ENTRY), np.int64)
        programs = 0
        for entry, i in zip(table, members, strict=True):
            before, after = pairs[i]
            strides = [
                s for pair in zip(before.stride(), after.stride(), strict=True) for s in pair
            ]
            entry[:] = (
                *(before.data_ptr(), after.data_ptr(), *before.shape, *strides),
                *(programs, first_units[i]),
            )
            programs += -(-before.shape[0] // chosen.units)
        counts = np.diff([*table[:, 8], programs])
        owners = np.repeat(np.arange(len(members), dtype=np.int32), counts)
        whole = bool((table[:, 3] % chosen.features == 0).all())
        device = pairs[members[0]][0].device
        launches.append(
            Launch(layout, chosen, whole, on_device(table, device), on_device(owners, device))
        )
    return Plan(tuple(launches), tuple(first_units[:-1]), first_units[-1])


def element_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return _TYPES[dtype]
