"""The sums behind every measure, one pass over both weights, in float64.

Everything that `decomposition` reports follows from four sums per unit. A kernel sees tensors
whose first dimension counts units and whose second counts features, and returns these sums.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS: Final = 1 << 17
"""Elements a CPU block holds: its float64 working set (4 MiB) stays in a core's cache."""


@dataclass(frozen=True)
class UnitSums:
    """Per-unit sums of a change d = w' − w_0; each a float64 tensor of shape (units,).

    Attributes:
        before_square: a = Σ w_0².
        dot: e = Σ d·w_0.
        update_square: c = Σ d².
        tangential_square: P = Σ (d − (e/a) w_0)², the part of c that turns the unit.
    """

    before_square: Tensor
    dot: Tensor
    update_square: Tensor
    tangential_square: Tensor


def dense_sums(before: Tensor, after: Tensor) -> UnitSums:
    """Sums of two dense weights of shape (units, features), same dtype and device.

    P is taken from d itself and not from c − e²/a, so that it is exact where a change is almost
    purely radial (weight decay with hardly any learning).
    """
    if before.device.type != "cpu":
        return _block_sums(before, after)
    rows = max(1, _BLOCK_ELEMENTS // before.shape[1])
    blocks = [
        _block_sums(before[start : start + rows], after[start : start + rows])
        for start in range(0, before.shape[0], rows)
    ]
    return UnitSums(
        *(torch.cat([getattr(block, f.name) for block in blocks]) for f in fields(UnitSums))
    )


def _block_sums(before: Tensor, after: Tensor) -> UnitSums:
    w = before.to(torch.float64)
    d = after.to(torch.float64) - w
    a = torch.einsum("nk,nk->n", w, w)
    e = torch.einsum("nk,nk->n", d, w)
    c = torch.einsum("nk,nk->n", d, d)
    d.addcmul_(w, _ratio(e, a).unsqueeze(1), value=-1)
    return UnitSums(a, e, c, torch.einsum("nk,nk->n", d, d))


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
    return UnitSums(a, e, c, (c - _ratio(e, a) * e).clamp_min(0.0))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0 (a unit with no direction)."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)
