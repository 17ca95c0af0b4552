"""A low-rank change by its factors: what every path of low-rank sums takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """The change scaling · B A of W_0.

    Attributes:
        before: W_0, shape (units, features).
        A: shape (rank, features).
        B: shape (units, rank).
        scaling: the factor on B A, alpha / rank in LoRA.
    """

    before: Tensor
    A: Tensor
    B: Tensor
    scaling: float

    @property
    def transposed(self) -> LowRankUpdate:
        """The same change of W_0 transposed: what were features are units."""
        return LowRankUpdate(self.before.T, self.B.T, self.A.T, self.scaling)
