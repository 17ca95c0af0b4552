"""Factors of many sites on the GPU, copied one after the other by one launch, and converted.

A float32 factor comes as three bfloat16 parts, 24 bits together, where the tensor cores take it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from dora_dynamics._kernels.sums import on_device
from dora_dynamics._kernels.triton_path import element_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ENTRY: Final = 7
"""Numbers a factor takes in the table, in the order in which the kernel reads them."""
_BLOCK: Final = 2048
"""Elements a program copies."""


@dataclass(frozen=True)
class Gathering:
    """What one launch copies.

    Attributes:
        dtype: of all of these factors.
        contiguous: whether all of them lie row by row without gaps.
        table: `_ENTRY` numbers a factor, on the device.
        owners: the factor of each program, on the device.
        size: elements of all.
    """

    dtype: torch.dtype
    contiguous: bool
    table: Tensor
    owners: Tensor
    size: int


def gathering(factors: Sequence[Tensor]) -> Gathering:
    """The copy of these factors, all of one dtype, one after the other, each row by row."""
    table = np.empty((len(factors), _ENTRY), np.int64)
    programs = offset = 0
    for entry, factor in zip(table, factors, strict=True):
        size = factor.numel()
        entry[:] = (factor.data_ptr(), factor.shape[1], *factor.stride(), size, programs, offset)
        programs += -(-size // _BLOCK)
        offset += size
    owners = np.repeat(np.arange(len(factors), dtype=np.int32), np.diff([*table[:, 5], programs]))
    return Gathering(
        dtype=factors[0].dtype,
        contiguous=all(factor.is_contiguous() for factor in factors),
        table=on_device(table, factors[0].device),
        owners=on_device(owners, factors[0].device),
        size=offset,
    )


def gather(what: Gathering, exact: Tensor, parts: Tensor | None = None) -> None:
    """Queue a copy.

    Args:
        what: the factors.
        exact: float64, takes all elements.
        parts: takes them too where given, shape (parts, elements or more): in its dtype, the first
            row as rounded, each further one what the rows before it leave.
    """
    if not len(what.owners):
        return
    with torch.cuda.device(exact.device):
        gather_kernel[(len(what.owners),)](
            what.table,
            what.owners,
            exact,
            exact if parts is None else parts,
            0 if parts is None else parts.stride(0),
            SOURCE=element_type(what.dtype),
            PARTS=0 if parts is None else len(parts),
            ENTRY=_ENTRY,
            BLOCK=_BLOCK,
            CONTIGUOUS=what.contiguous,
            num_warps=4,
        )


def _gather_kernel(
    table: tl.tensor,
    owners: tl.tensor,
    exact: tl.tensor,
    parts: tl.tensor,
    apart: tl.tensor,
    SOURCE: tl.constexpr,
    PARTS: tl.constexpr,
    ENTRY: tl.constexpr,
    BLOCK: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    entry = table + tl.load(owners + program).to(tl.int64) * ENTRY
    source = tl.load(entry).to(tl.pointer_type(SOURCE))
    columns = tl.load(entry + 1).to(tl.int32)
    row_apart = tl.load(entry + 2)
    column_apart = tl.load(entry + 3)
    size = tl.load(entry + 4)
    first_program = tl.load(entry + 5).to(tl.int32)
    offset = tl.load(entry + 6)

    index = (program - first_program) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    if CONTIGUOUS:
        value = tl.load(source + index, mask=inside, other=0.0)
    else:
        place = (index // columns).to(tl.int64) * row_apart
        place += (index % columns).to(tl.int64) * column_apart
        value = tl.load(source + place, mask=inside, other=0.0)
    tl.store(exact + offset + index, value.to(tl.float64), mask=inside)
    if PARTS > 0:
        rest = value.to(tl.float32)
        for part in tl.static_range(PARTS):
            rounded = rest.to(parts.dtype.element_ty)
            tl.store(parts + part * apart + offset + index, rounded, mask=inside)
            rest -= rounded.to(tl.float32)


gather_kernel: Any = triton.jit(_gather_kernel)
