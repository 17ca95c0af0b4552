"""Sums of a low-rank change from its factors: W' is never built."""

from __future__ import annotations

import importlib
from functools import partial
from importlib.util import find_spec
from itertools import compress
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from dora_dynamics._kernels import blocks, threads
from dora_dynamics._kernels.sums import (
    LARGEST,
    SMALLEST,
    TANGENTIAL_SHARE,
    UnitSums,
    aligned,
    ratio,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dora_dynamics._kernels.low_rank_update import LowRankUpdate

_BLOCK_ELEMENTS: Final = 1 << 17
"""Elements a CPU block holds: its float64 working set (4 MiB) stays in a core's cache."""
_LARGE: Final = 1 << 20
"""Elements from which float32 is worth its rounding on a CPU."""
_CPU_BLOCK: Final = 1 << 22
"""Elements torch multiplies at a time there: enough to keep its threads from waiting."""
_DEVICE_BLOCK: Final = 1 << 24
"""On a GPU a block is as large as its float64 copy may be: 128 MiB."""


def low_rank_sums(update: LowRankUpdate) -> UnitSums:
    """Sums of the low-rank change d = scaling · B A without building it.

    The products of rank size are kept in float64: c = s² diag(B (A Aᵀ) Bᵀ) and
    e = s Σ (W_0 Aᵀ) ∘ B.
    """
    return low_rank_sums_of_all([update])[0]


def low_rank_sums_of_all(updates: Sequence[LowRankUpdate]) -> list[UnitSums]:
    """`low_rank_sums` of many updates at once, in order.

    Those on one GPU take one launch per dtype and rank and one transfer back.
    """
    sums: dict[int, UnitSums] = {}
    with torch.no_grad():
        for device in dict.fromkeys(update.before.device for update in updates):
            here = [i for i, update in enumerate(updates) if update.before.device == device]
            some = [updates[i] for i in here]
            if device.type == "cuda" and find_spec("triton") is not None:
                path = importlib.import_module("dora_dynamics._kernels.triton_low_rank")
                fits = [path.fits(update) for update in some]
                fast = iter(path.sums_of_all(list(compress(some, fits))))
                found = [
                    next(fast) if fit else plain_sums(update)
                    for update, fit in zip(some, fits, strict=True)
                ]
            elif device.type == "cpu":
                found = [
                    (cpu_sums if update.before.numel() >= _LARGE else plain_sums)(update)
                    for update in some
                ]
            else:
                found = [plain_sums(update) for update in some]
            sums.update(zip(here, found, strict=True))
    return [sums[i] for i in range(len(updates))]


def cpu_sums(update: LowRankUpdate) -> UnitSums:
    """The sums with W_0 Aᵀ in float32, all else in float64; `plain_sums` where that is too little.

    The difference of DoRA's m and √a cancels, so that a is float64 as well. torch multiplies large
    blocks over its own threads; the squares are summed over ours.
    """
    before, A, B = update.before, update.A, update.B
    if before.dtype == torch.float64 or A.dtype == torch.float64:
        return plain_sums(update)
    units, features = before.shape
    squares = np.zeros(units)
    e = torch.empty(units, dtype=torch.float64)
    A_32, B_64 = A.to(torch.float32), B.to(torch.float64)
    rows = max(1, _CPU_BLOCK // features)
    shared = threads.workers() >= blocks.LEAST_THREADS
    step = max(1, blocks.block_size(shared) // features)
    for start in range(0, units, rows):
        block = slice(start, start + rows)
        w = aligned(before[block]).to(torch.float32)
        threads.run_all(
            [
                partial(blocks.add_squares, w[i : i + step], squares[block][i : i + step])
                for i in range(0, len(w), step)
            ],
            worth_threads=shared,
        )
        e[block] = torch.einsum("nr,nr->n", (w @ A_32.T).to(torch.float64), B_64[block])
        del w  # so that two blocks are never held at once
    e *= update.scaling
    a, c = torch.from_numpy(squares), _update_squares(update)
    sums = UnitSums(torch.stack([a, e, c, (c - ratio(e, a) * e).clamp_min(0.0)]))
    return sums if is_believable(sums) else plain_sums(update)


def is_believable(sums: UnitSums) -> bool:
    """Whether float32 was enough: weights in its range, and no update almost along the weights."""
    a, c, P = sums.before_square, sums.update_square, sums.tangential_square
    in_range = ((a >= SMALLEST) & (a <= LARGEST)) | (a == 0)
    return bool((in_range & (TANGENTIAL_SHARE * c <= P)).all())


def plain_sums(update: LowRankUpdate) -> UnitSums:
    """The sums in plain torch and float64, on any device that has it."""
    before, scaling = update.before, update.scaling
    A, B = update.A.to(torch.float64), update.B.to(torch.float64)
    elements = _BLOCK_ELEMENTS if before.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, elements // before.shape[1])
    a = torch.empty(before.shape[0], dtype=torch.float64, device=before.device)
    e = torch.empty_like(a)
    for start in range(0, before.shape[0], rows):
        block = slice(start, start + rows)
        w = aligned(before[block]).to(torch.float64)
        a[block] = torch.einsum("nk,nk->n", w, w)
        e[block] = scaling * torch.einsum("nr,nr->n", w @ A.T, B[block])
    c = _update_squares(update)
    return UnitSums(torch.stack([a, e, c, (c - ratio(e, a) * e).clamp_min(0.0)]))


def _update_squares(update: LowRankUpdate) -> Tensor:
    A, B = update.A.to(torch.float64), update.B.to(torch.float64)
    c: Tensor = update.scaling**2 * torch.einsum("nr,nr->n", B @ (A @ A.T), B)
    return c
