"""What an effective weight can be: a full matrix, or a base weight's low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor


class NoDenseWeightError(InputError, TypeError):
    """A module does not multiply by one matrix that could be followed; the message says why."""


@dataclass(frozen=True, eq=False)
class Check:
    """What must hold of a weight that was read; the answer is still where the weight is.

    To look at each answer at once would make the host wait for a GPU as often as there are
    layers: they come over together, with what was measured.

    Attributes:
        holds: one boolean.
        otherwise: what to raise where it is false.
        by_probing: whether probing may give the weight then.
    """

    holds: Tensor
    otherwise: NoDenseWeightError
    by_probing: bool = False


@dataclass(frozen=True)
class Dense:
    """A full effective weight W', stored as the module stores it.

    Attributes:
        weight: W'. What was computed from an adapter is in float64, also where the module stores
            less.
        checks: what must hold for it to be W', not looked at yet.
    """

    weight: Tensor
    checks: tuple[Check, ...] = ()


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


def failed(checks: Iterable[Check]) -> list[Check]:
    """The checks that do not hold; this waits for each."""
    return [check for check in checks if not bool(check.holds)]


def settled(read: Callable[[bool], EffectiveWeight]) -> EffectiveWeight:
    """A weight whose checks were waited for, read by probing where only that is left.

    Args:
        read: reads the weight, given whether it is to be probed.

    Raises:
        NoDenseWeightError: there is no dense weight.
    """
    for probe in (False, True):
        found = read(probe)
        if not isinstance(found, Dense):
            return found
        wrong = failed(found.checks)
        if not wrong:
            return replace(found, checks=())
        if probe or not wrong[0].by_probing:
            break
    raise wrong[0].otherwise
