"""Low-rank updates on the GPU: W_0 is read once, by the tensor cores, for all sites together.

e = s Σ (W_0 Aᵀ) ∘ B takes the product W_0 Aᵀ. A bfloat16 W_0 is multiplied by A split into three
bfloat16 parts, whose products are exact in float32; other W_0 by three TF32 products. The tensor
cores' own sums are cut after every tile, because they round towards zero. Where float32 is too
little (weights out of its range, an update almost along the weights) `triton_low_rank_again` sums
again. The products of rank
size, c = s² diag(B (A Aᵀ) Bᵀ), are float64, and so is a: DoRA's m is compared with √a, and that
difference cancels.

Sites are taken in groups, so that what is copied for the kernel, A in its parts and A and B in
float64, is that of a few sites: 160 MB at most, or what one site takes, however many there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from dora_dynamics._kernels.sums import UnitSums, from_array, on_device, ratio, to_host
from dora_dynamics._kernels.triton_low_rank_again import sum_again
from dora_dynamics._kernels.triton_path import element_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dora_dynamics._kernels.low_rank_update import LowRankUpdate

_ENTRY: Final = 11
"""Numbers a site takes in the table, in the order in which the kernel reads them."""
TILINGS: Final = {
    16: (64, 128, 4, 3),
    32: (64, 128, 4, 3),
    64: (64, 64, 4, 3),
    128: (128, 64, 8, 3),
}
"""By rank: units and features of a tile, warps, and tiles in flight."""
_PACKED: Final = 1 << 23
"""Elements of A in one launch, and in its three parts at a time."""
_PRODUCT: Final = 1 << 22
"""Elements of A or B converted to float64 at a time."""


def _low_rank_kernel(
    table: tl.tensor,
    owners: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    packed: tl.tensor,
    part: tl.tensor,
    one: tl.tensor,
    W: tl.constexpr,
    B: tl.constexpr,
    SPLIT: tl.constexpr,
    ENTRY: tl.constexpr,
    UNITS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    entry = table + tl.load(owners + program).to(tl.int64) * ENTRY
    before = tl.load(entry).to(tl.pointer_type(W))
    factor = tl.load(entry + 1).to(tl.pointer_type(B))
    units = tl.load(entry + 2).to(tl.int32)
    features = tl.load(entry + 3).to(tl.int32)
    rank = tl.load(entry + 4).to(tl.int32)
    apart = tl.load(entry + 5)
    factor_unit = tl.load(entry + 6)
    factor_rank = tl.load(entry + 7)
    first_program = tl.load(entry + 8).to(tl.int32)
    first_unit = tl.load(entry + 9)
    packed += tl.load(entry + 10)
    if ALIGNED:
        before = tl.multiple_of(before, 16)
        apart = tl.multiple_of(apart, 16)
        packed = tl.multiple_of(packed, 16)
        features = tl.multiple_of(features, 16)
        part = tl.multiple_of(part, 16)
        if BY_COLUMN:
            units = tl.multiple_of(units, 16)

    unit = (program - first_program) * UNITS + tl.arange(0, UNITS)
    inside = unit < units
    column = tl.arange(0, FEATURES)
    r = tl.arange(0, RANK)
    a = tl.zeros((UNITS, FEATURES // 8), tl.float64)
    projected = tl.zeros((UNITS, RANK), tl.float32)
    for start in tl.range(0, features, FEATURES):
        k = start + column
        if BY_COLUMN:
            address = before + unit[:, None] + (k.to(tl.int64) * apart)[None, :]
        else:
            address = before + (unit.to(tl.int64) * apart)[:, None] + k[None, :]
        w = tl.load(address, mask=inside[:, None] & (k < features)[None, :], other=0.0)
        wide = w.to(tl.float32)
        exact = w.to(tl.float64)
        a += tl.sum(tl.reshape(exact * exact, (UNITS, FEATURES // 8, 8)), 2)
        # rows of zeros beyond the rank come from the mask
        place = packed + (r.to(tl.int64) * features)[None, :] + k[:, None]
        mask = (k < features)[:, None] & (r < rank)[None, :]
        if SPLIT:
            low = tl.load(place + 2 * part, mask=mask, other=0.0)
            middle = tl.load(place + part, mask=mask, other=0.0)
            high = tl.load(place, mask=mask, other=0.0)
            product = tl.dot(w, low)
            product = tl.dot(w, middle, product)
            product = tl.dot(w, high, product)
        else:
            product = tl.dot(wide, tl.load(place, mask=mask, other=0.0), input_precision="tf32x3")
        # `one` keeps the compiler from handing the running sum to the tensor cores
        projected = tl.fma(product, tl.zeros_like(product) + one, projected)
    place = factor + (unit.to(tl.int64) * factor_unit)[:, None] + (r * factor_rank)[None, :]
    b = tl.load(place, mask=inside[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
    slot = out + first_unit + unit
    tl.store(slot, tl.sum(a, 1), mask=inside)
    tl.store(slot + total, tl.sum((projected * b).to(tl.float64), 1), mask=inside)


low_rank_kernel: Any = triton.jit(_low_rank_kernel)


def sums_of_all(updates: Sequence[LowRankUpdate]) -> list[UnitSums]:
    """`low_rank.low_rank_sums` of updates on one device that `fits`: one transfer, one wait."""
    if not updates:
        return []
    sums, first_units = queue(updates)
    host = to_host(sums)()
    return [
        from_array(host[:, first : first + update.before.shape[0]])
        for first, update in zip(first_units, updates, strict=True)
    ]


def fits(update: LowRankUpdate) -> bool:
    """Whether the kernel was made for it."""
    before = update.before
    return (
        before.dtype != torch.float64
        and update.A.shape[0] <= max(TILINGS)
        and 1 in before.stride()
        and update.A.device == update.B.device == before.device
    )


def queue(updates: Sequence[LowRankUpdate]) -> tuple[Tensor, list[int]]:
    """Queue all work; the sums will be in the returned tensor, each site's from its first unit."""
    counts = [update.before.shape[0] for update in updates]
    first_units = [0, *accumulate(counts)]
    device = updates[0].before.device
    sums = torch.empty((4, first_units[-1]), dtype=torch.float64, device=device)
    groups: dict[Kind, list[int]] = {}
    for i, update in enumerate(updates):
        groups.setdefault(_kind(update), []).append(i)
    for kind, members in groups.items():
        for few in in_portions(members, [updates[i].A.numel() for i in members], _PACKED):
            some = [updates[i] for i in few]
            starts = [first_units[i] for i in few]
            packed = pack(some)
            squares(some, starts, packed, sums)
            launch(kind, some, starts, packed, sums)
    a, e, c, P = sums
    scalings = on_device(np.array([update.scaling for update in updates], np.float64), device)
    e *= scalings.repeat_interleave(on_device(np.array(counts), device), output_size=len(e))
    torch.sub(c, ratio(e, a) * e, out=P).clamp_min_(0.0)
    sum_again(updates, first_units, scalings, sums)
    return sums, first_units[:-1]


@dataclass(frozen=True)
class Kind:
    """What the kernel is compiled for: dtypes of W_0, A and B, padded rank, layout of W_0."""

    before: torch.dtype
    A: torch.dtype
    B: torch.dtype
    rank: int
    by_column: bool


def _kind(update: LowRankUpdate) -> Kind:
    before, A, B = update.before, update.A, update.B
    rank = triton.next_power_of_2(max(A.shape[0], min(TILINGS)))
    by_column = before.stride(1) != 1 and before.stride(0) == 1
    return Kind(before.dtype, A.dtype, B.dtype, rank, by_column)


def in_portions(items: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """The items in order, in lists of which each takes at most `limit`, or holds one item."""
    portions: list[list[int]] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if not portions or held + size > limit:
            portions.append([])
            held = 0
        portions[-1].append(item)
        held += size
    return portions


def pack(updates: Sequence[LowRankUpdate]) -> Tensor:
    """A of all sites, one after the other, each row by row."""
    return torch.cat([update.A.reshape(-1) for update in updates])


def launch(
    kind: Kind,
    updates: Sequence[LowRankUpdate],
    starts: Sequence[int],
    packed: Tensor,
    sums: Tensor,
) -> None:
    """Fill in a and e without its scaling, for updates of one kind; `packed` is used up."""
    device = sums.device
    split = kind.before == torch.bfloat16
    units, features, warps, stages = TILINGS[kind.rank]
    table = np.empty((len(updates), _ENTRY), np.int64)
    programs = offset = 0
    for entry, first, update in zip(table, starts, updates, strict=True):
        before, A, B = update.before, update.A, update.B
        apart = before.stride(1 if kind.by_column else 0)
        entry[:] = (
            *(before.data_ptr(), B.data_ptr(), *before.shape, A.shape[0], apart),
            *(*B.stride(), programs, first, offset),
        )
        programs += -(-before.shape[0] // units)
        offset += A.numel()
    owners = np.repeat(np.arange(len(updates), dtype=np.int32), np.diff([*table[:, 8], programs]))
    multiples = table[:, [0, 2, 3, 5, 10] if kind.by_column else [0, 3, 5, 10]]
    aligned = bool((multiples % 16 == 0).all()) and packed.numel() % 16 == 0
    with torch.cuda.device(device):
        low_rank_kernel[(programs,)](
            on_device(table, device),
            on_device(owners, device),
            sums,
            sums.shape[1],
            _three_parts(packed) if split else packed.to(torch.float32),
            packed.numel(),
            1.0,
            W=element_type(kind.before),
            B=element_type(kind.B),
            SPLIT=split,
            ENTRY=_ENTRY,
            UNITS=units,
            FEATURES=features,
            RANK=kind.rank,
            BY_COLUMN=kind.by_column,
            ALIGNED=aligned,
            num_warps=warps,
            num_stages=stages,
        )


def _three_parts(packed: Tensor) -> Tensor:
    """A as three bfloat16 parts, 24 bits together, one after the other; `packed` is used up."""
    parts = torch.empty((3, packed.numel()), dtype=torch.bfloat16, device=packed.device)
    rest = packed.to(torch.float32)
    for part in parts:
        part.copy_(rest)
        rest -= part
    return parts


def squares(
    updates: Sequence[LowRankUpdate], starts: Sequence[int], packed: Tensor, sums: Tensor
) -> None:
    """Fill in c, in float64, for as many sites of one shape at a time as memory allows."""
    shapes: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    offsets = [0, *accumulate(update.A.numel() for update in updates)]
    for i, update in enumerate(updates):
        shapes.setdefault((update.A.shape, update.B.shape), []).append(i)
    for (a_shape, b_shape), members in shapes.items():
        step = max(1, _PRODUCT // max(a_shape.numel(), b_shape.numel()))
        for start in range(0, len(members), step):
            some = members[start : start + step]
            A = torch.stack([packed[offsets[i] : offsets[i + 1]] for i in some]).double()
            A = A.view(-1, *a_shape)
            B = torch.stack([updates[i].B for i in some]).double()
            scale = on_device(np.array([updates[i].scaling for i in some]), sums.device)
            product = torch.bmm(B, torch.bmm(A, A.mT)).mul_(B)
            c = product.sum(2) * (scale * scale)[:, None]
            where = np.add.outer([starts[i] for i in some], np.arange(b_shape[0]))
            sums[2].index_copy_(0, on_device(where.ravel(), sums.device), c.ravel())
