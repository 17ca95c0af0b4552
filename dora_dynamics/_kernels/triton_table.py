"""One launch for many weights, over a table: what a program must know of its weight.

A row of the table is a weight's entry; the kernel reads its numbers in the order in which they are
written. The last two are the same in every table: the first of the weight's programs, and where
what it makes of the weight begins in the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import triton
import triton.language as tl

from dora_dynamics._kernels.sums import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray
    from torch import Tensor


def shared_out(
    table: NDArray[np.int64],
    lengths: Sequence[int],
    step: int,
    firsts: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Share the weights out to programs, and fill in the last two numbers of each entry.

    Args:
        table: one entry a weight.
        lengths: units of each weight, or elements; 0 for one that the launch has no part in.
        step: how many of them a program takes.
        firsts: where those of each weight begin in the output.
        device: where the launch is made.

    Returns:
        The table, and the weight of each program, on the device.
    """
    programs = -(-np.asarray(lengths) // step)
    table[:, -2] = programs.cumsum() - programs
    table[:, -1] = firsts
    owners = np.repeat(np.arange(len(table), dtype=np.int32), programs)
    return on_device(table, device), on_device(owners, device)


def _own_share(
    table: tl.tensor, owners: tl.tensor, ENTRY: tl.constexpr, STEP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """In a kernel: the program's weight, its entry, the program's units of it, and its first."""
    program = tl.program_id(0)
    owner = tl.load(owners + program).to(tl.int64)
    entry = table + owner * ENTRY
    first_program = tl.load(entry + (ENTRY - 2)).to(tl.int32)
    first_unit = tl.load(entry + (ENTRY - 1))
    unit = (program - first_program) * STEP + tl.arange(0, STEP)
    return owner, entry, unit, first_unit


own_share: Any = triton.jit(_own_share)
