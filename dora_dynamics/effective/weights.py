"""What an effective weight can be: a full matrix, or a base weight's low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """A full effective weight W', stored as the module stores it.

    What was computed from an adapter is in float64, also where the module stores less.
    """

    weight: Tensor


@dataclass(frozen=True)
class LowRank:
    """A LoRA or DoRA weight by its factors: W_0 is known, and the rest is rank-sized.

    Attributes:
        A: shape (rank, in).
        B: shape (out, rank).
        scaling: the factor on B A.
        magnitude: DoRA's m, shape (out,), or None for LoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None


EffectiveWeight = Dense | LowRank


class NoDenseWeightError(InputError, TypeError):
    """A module does not multiply by one matrix that could be followed; the message says why."""
