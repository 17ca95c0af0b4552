"""Sums of a low-rank change from its factors: W' is never built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from dora_dynamics._kernels.sums import UnitSums, ratio

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS: Final = 1 << 17
"""Elements a CPU block holds: its float64 working set (4 MiB) stays in a core's cache."""


def low_rank_sums(before: Tensor, A: Tensor, B: Tensor, scaling: float) -> UnitSums:
    """Sums of the low-rank change d = scaling · B A without building it.

    Args:
        before: W_0, shape (units, features).
        A: shape (rank, features).
        B: shape (units, rank).
        scaling: the factor on B A, alpha / rank in LoRA.

    The products of rank size are kept in float64: c = s² diag(B (A Aᵀ) Bᵀ) and
    e = s Σ (W_0 Aᵀ) ∘ B.
    """
    A64, B64 = A.to(torch.float64), B.to(torch.float64)
    rows = max(1, _BLOCK_ELEMENTS // before.shape[1])
    a = torch.empty(before.shape[0], dtype=torch.float64, device=before.device)
    e = torch.empty_like(a)
    for start in range(0, before.shape[0], rows):
        w = before[start : start + rows].to(torch.float64)
        a[start : start + rows] = torch.einsum("nk,nk->n", w, w)
        e[start : start + rows] = scaling * torch.einsum(
            "nr,nr->n", w @ A64.T, B64[start : start + rows]
        )
    c = scaling**2 * torch.einsum("nr,rs,ns->n", B64, A64 @ A64.T, B64)
    return UnitSums(a, e, c, (c - ratio(e, a) * e).clamp_min(0.0))
