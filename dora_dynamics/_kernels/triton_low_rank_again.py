"""Low-rank sums for which float32 was too little, summed again in float64 on the GPU.

Nothing on the host decides: the kernel looks at every unit's sums, and a program in which all can
be believed ends at once. So no one waits, and the weights may be changed by what is queued next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from dora_dynamics._kernels.sums import LARGEST, SMALLEST, TANGENTIAL_SHARE, on_device
from dora_dynamics._kernels.triton_path import element_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dora_dynamics._kernels.low_rank_update import LowRankUpdate

_ENTRY: Final = 14
"""Numbers a site takes in the table, in the order in which the kernel reads them."""
_UNITS: Final = 16
_FEATURES: Final = 64


def _again_kernel(
    table: tl.tensor,
    owners: tl.tensor,
    scalings: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    W: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    ENTRY: tl.constexpr,
    UNITS: tl.constexpr,
    FEATURES: tl.constexpr,
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
    SHARE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    site = tl.load(owners + program).to(tl.int64)
    entry = table + site * ENTRY
    units = tl.load(entry + 3).to(tl.int32)
    first_program = tl.load(entry + 12).to(tl.int32)
    first_unit = tl.load(entry + 13)
    unit = (program - first_program) * UNITS + tl.arange(0, UNITS)
    inside = unit < units
    slot = out + first_unit + unit
    a = tl.load(slot, mask=inside, other=0.0)
    c = tl.load(slot + 2 * total, mask=inside, other=0.0)
    tangential = tl.load(slot + 3 * total, mask=inside, other=0.0)
    believed = ((a >= SMALL) & (a <= LARGE)) | (a == 0.0)
    believed = believed & (tangential >= SHARE * c)
    again = inside & (believed == 0)
    if tl.max(again.to(tl.int32), 0) > 0:
        before = tl.load(entry).to(tl.pointer_type(W))
        down = tl.load(entry + 1).to(tl.pointer_type(A))
        up = tl.load(entry + 2).to(tl.pointer_type(B))
        features = tl.load(entry + 4).to(tl.int32)
        rank = tl.load(entry + 5).to(tl.int32)
        before_unit = tl.load(entry + 6)
        before_feature = tl.load(entry + 7)
        down_rank = tl.load(entry + 8)
        down_feature = tl.load(entry + 9)
        up_unit = tl.load(entry + 10)
        up_rank = tl.load(entry + 11)
        column = tl.arange(0, FEATURES)
        rows = before + (unit.to(tl.int64) * before_unit)[:, None]
        e = tl.zeros((UNITS,), tl.float64)
        for r in tl.range(0, rank):
            projected = tl.zeros((UNITS, FEATURES), tl.float64)
            for start in tl.range(0, features, FEATURES):
                k = (start + column).to(tl.int64)
                here = start + column < features
                mask = again[:, None] & here[None, :]
                w = tl.load(rows + (k * before_feature)[None, :], mask=mask, other=0.0)
                x = tl.load(down + r * down_rank + k * down_feature, mask=here, other=0.0)
                projected += w.to(tl.float64) * x.to(tl.float64)[None, :]
            place = up + unit.to(tl.int64) * up_unit + r * up_rank
            b = tl.load(place, mask=again, other=0.0).to(tl.float64)
            e += tl.sum(projected, 1) * b
        e *= tl.load(scalings + site)
        tangential = c - tl.where(a == 0.0, 0.0, e / a) * e
        tangential = tl.where(tangential < 0.0, 0.0, tangential)
        tl.store(slot + total, e, mask=again)
        tl.store(slot + 3 * total, tangential, mask=again)


again_kernel: Any = triton.jit(_again_kernel)


@dataclass(frozen=True)
class Again:
    """One launch, for all updates of the same dtypes.

    Attributes:
        dtypes: of W_0, A and B.
        table: `_ENTRY` numbers an update, on the device.
        owners: the update of each program, on the device.
    """

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    table: Tensor
    owners: Tensor


def launches(updates: Sequence[LowRankUpdate], first_units: Sequence[int]) -> list[Again]:
    """What looks at every unit of these updates, all on one device.

    Args:
        updates: these.
        first_units: where the units of each are in the sums.
    """
    device = updates[0].before.device
    kinds: dict[tuple[torch.dtype, torch.dtype, torch.dtype], list[int]] = {}
    for i, update in enumerate(updates):
        kind = (update.before.dtype, update.A.dtype, update.B.dtype)
        kinds.setdefault(kind, []).append(i)
    found = []
    for kind, members in kinds.items():
        table = np.empty((len(updates), _ENTRY), np.int64)
        counts = []
        programs = 0
        for i in members:
            before, A, B = updates[i].before, updates[i].A, updates[i].B
            table[i] = (
                *(before.data_ptr(), A.data_ptr(), B.data_ptr(), *before.shape, A.shape[0]),
                *(*before.stride(), *A.stride(), *B.stride(), programs, first_units[i]),
            )
            counts.append(-(-before.shape[0] // _UNITS))
            programs += counts[-1]
        owners = np.repeat(np.array(members, np.int32), counts)
        found.append(Again(kind, on_device(table, device), on_device(owners, device)))
    return found


def sum_again(all_units: Sequence[Again], scalings: Tensor, sums: Tensor) -> None:
    """Queue what puts e and P right where they cannot be believed.

    Args:
        all_units: what looks at them.
        scalings: of each update, float64, on the device.
        sums: shape (4, units of all): a, e, c and P.
    """
    with torch.cuda.device(sums.device):
        for some in all_units:
            before, A, B = (element_type(dtype) for dtype in some.dtypes)
            again_kernel[(len(some.owners),)](
                some.table,
                some.owners,
                scalings,
                sums,
                sums.shape[1],
                W=before,
                A=A,
                B=B,
                ENTRY=_ENTRY,
                UNITS=_UNITS,
                FEATURES=_FEATURES,
                SMALL=SMALLEST,
                LARGE=LARGEST,
                SHARE=TANGENTIAL_SHARE,
                num_warps=4,
            )
