"""W' from an adapter's factors, in full."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from dora_dynamics.effective.weights import LowRank


def built(base: Tensor, factors: LowRank, row_norms: Tensor | None = None) -> Tensor:
    """The weight that LoRA or DoRA applies: base + s·B A, each row at DoRA's magnitude (Eq. 5).

    Args:
        base: what lies below the adapter, shape (out, in), or a block of it with the factors' own.
        factors: A, B, s and m.
        row_norms: the norms of the rows of base + s·B A, shape (out,), where `base` holds parts of
            the rows only.

    Returns:
        In float64. A row of zero norm stays zero.
    """
    A, B = factors.A.to(torch.float64), factors.B.to(torch.float64)
    turned: Tensor = base.to(torch.float64) + factors.scaling * (B @ A)
    if factors.magnitude is None:
        return turned
    norm = torch.linalg.vector_norm(turned, dim=1) if row_norms is None else row_norms
    m = factors.magnitude.to(turned)
    return (m / norm.masked_fill(norm == 0, 1.0)).unsqueeze(1) * turned
