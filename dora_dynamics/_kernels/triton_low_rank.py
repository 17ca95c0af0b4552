"""Low-rank updates on the GPU: W_0 is read once, by the tensor cores, for all sites together.

e = s Σ (W_0 Aᵀ) ∘ B takes the product W_0 Aᵀ. A bfloat16 W_0 is multiplied by A split into three
bfloat16 parts, whose products are exact in float32; other W_0 by three TF32 products. The tensor
cores' own sums are cut after every tile, because they round towards zero. Where float32 is too
little (weights out of its range, an update almost along the weights) `triton_low_rank_again` sums
again. The products of rank
size, c = s² diag(B (A Aᵀ) Bᵀ), are float64, and so is a: DoRA's m is compared with √a, and that
difference cancels.

Sites are taken in portions, so that what is copied for the kernel, A in its parts and A and B in
float64, is that of a few sites: 240 MB at most, or what one site takes, however many there are.
Much of the time of small updates is the host's, which queues all this: hence a plan that is kept,
and the work of all sites of a shape in one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from dora_dynamics._kernels.sums import UnitSums, from_array, ratio, to_host
from dora_dynamics._kernels.triton_gather import gather
from dora_dynamics._kernels.triton_low_rank_again import sum_again
from dora_dynamics._kernels.triton_low_rank_plan import ENTRY, fits, plan_of
from dora_dynamics._kernels.triton_path import element_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dora_dynamics._kernels.low_rank_update import LowRankUpdate
    from dora_dynamics._kernels.triton_low_rank_plan import Kind, Plan, Portion

__all__ = ["fits", "queue", "sums_of_all"]


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


def queue(updates: Sequence[LowRankUpdate]) -> tuple[Tensor, tuple[int, ...]]:
    """Queue all work; the sums will be in the returned tensor, each site's from its first unit.

    Sites of one kind and shape lie side by side there, whatever their order.
    """
    plan = plan_of(updates)
    sums = torch.empty((4, plan.total), dtype=torch.float64, device=plan.scalings.device)
    run(plan, sums)
    return sums, plan.first_units


def run(plan: Plan, sums: Tensor) -> None:
    """Queue the launches of a plan, which fill `sums`, shape (4, plan.total)."""
    workspace = Workspace(plan, sums.device)
    for portion in plan.portions:
        parts = workspace.parts(portion.kind)
        gather(portion.A, workspace.A, parts)
        gather(portion.B, workspace.B)
        squares(portion, workspace, sums)
        launch(portion, parts, sums)
    scaling = plan.laid[0].repeat_interleave(plan.laid[1].long(), output_size=plan.total)
    a, e, c, P = sums
    e *= scaling
    c *= scaling.square_()
    torch.sub(c, ratio(e, a) * e, out=P).clamp_min_(0.0)
    sum_again(plan.again, plan.scalings, sums)


class Workspace:
    """Memory on the device that the portions use one after the other."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Make room for the largest portion."""
        A = max(portion.A.size for portion in plan.portions)
        B = max(portion.B.size for portion in plan.portions)
        double: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.A, self.B, self.product = (torch.empty(size, **double) for size in (A, B, B))
        self._parts: dict[bool, Tensor] = {}

    def parts(self, kind: Kind) -> Tensor:
        """Room for A as the kernel multiplies it, shape (parts, elements)."""
        split = kind.is_split
        if split not in self._parts:
            dtype, rows = (torch.bfloat16, 3) if split else (torch.float32, 1)
            length = -(-len(self.A) // 16) * 16
            self._parts[split] = torch.empty((rows, length), dtype=dtype, device=self.A.device)
        return self._parts[split]


def launch(portion: Portion, parts: Tensor, sums: Tensor) -> None:
    """Fill in a, and e without its scaling."""
    kind = portion.kind
    units, features, warps, stages = kind.tiling
    with torch.cuda.device(sums.device):
        low_rank_kernel[(len(portion.owners),)](
            portion.table,
            portion.owners,
            sums,
            sums.shape[1],
            parts,
            parts.stride(0),
            1.0,
            W=element_type(kind.before),
            B=element_type(kind.B),
            SPLIT=kind.is_split,
            ENTRY=ENTRY,
            UNITS=units,
            FEATURES=features,
            RANK=kind.rank,
            BY_COLUMN=kind.by_column,
            ALIGNED=portion.aligned,
            num_warps=warps,
            num_stages=stages,
        )


def squares(portion: Portion, workspace: Workspace, sums: Tensor) -> None:
    """Fill in c without its scaling, in float64, the updates of one shape together."""
    a = b = 0
    unit = portion.first_unit
    for (a_shape, b_shape), count in portion.shapes.items():
        a_size, b_size = count * a_shape.numel(), count * b_shape.numel()
        A = workspace.A[a : a + a_size].view(count, *a_shape)
        B = workspace.B[b : b + b_size].view(count, *b_shape)
        product = workspace.product[:b_size].view(count, *b_shape)
        torch.bmm(B, torch.bmm(A, A.mT), out=product)
        units = count * b_shape[0]
        out = sums[2, unit : unit + units].view(count, b_shape[0])
        torch.sum(product.mul_(B), 2, out=out)
        a, b, unit = a + a_size, b + b_size, unit + units
