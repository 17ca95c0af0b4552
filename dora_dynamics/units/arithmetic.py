"""The arithmetic of Eq. 2 to 4 on the units of one weight or of many, numpy's or a device's.

The arrays of a change are six, in the order of the fields of `decomposition.UnitChange`:
magnitude before and after, their difference, 1 − cos, squared update, radial update.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dora_dynamics._arrays import Array, as_numbers, is_finite, library_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

NAN: Final = float("nan")


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The change of one weight, reduced over its units (Eq. 3 and 4, and what stands beside them).

    Attributes:
        delta_magnitude: ΔM of Eq. 3, the mean over units of |m' − m_0|, in the weight's own units.
        delta_direction: ΔD of Eq. 4, the mean over units of 1 − cos(w', w_0); from 0 to 2.
        signed_delta_magnitude: mean over units of m' − m_0; negative where units shrink.
        relative_delta_magnitude: mean over units of |m' − m_0| / m_0.
        magnitude_before: mean over units of m_0.
        update_norm: Frobenius norm of W' − W_0.
        radial_share: share of the squared update along the units' own directions, from 0 to 1;
            NaN where nothing changed.
        zero_units: number of units without direction: of zero norm, before or after, or shrunk more
            than a billionfold.
        non_finite: number of units with NaN or Inf, before or after.
    """

    delta_magnitude: float
    delta_direction: float
    signed_delta_magnitude: float
    relative_delta_magnitude: float
    magnitude_before: float
    update_norm: float
    radial_share: float
    zero_units: int
    non_finite: int


MEASURES: Final = tuple(field.name for field in fields(Measures))
"""What `measures` returns; the last two are counts."""


LEAST_LEFT: Final = 1e-9
"""Share of m_0 from which on the direction of what is left of a unit is known: sums of differences
know w' to 1e-16 of w_0 only."""
LEAST_LEFT_BY_FACTORS: Final = 1e-5
"""The same where the sums are of a low-rank update: P = c − e²/a cancels when c is nearly a."""


def unit_arrays(
    a: Array, e: Array, c: Array, P: Array, *, least_left: float = LEAST_LEFT
) -> list[Array]:
    """The six arrays from the four sums of a change, per unit.

    With k = 1 + e/a: m = √(k²a + P), m − m_0 = (2e + e²/a + P)/(m + m_0) and
    1 − cos = P/(m (m + k m_0)); none of them cancels where the change is small. A unit of which
    less than a share `least_left` is left has lost its direction: 1 − cos is NaN, as of none.
    """
    library = library_of(a)
    where = library.where
    with np.errstate(all="ignore"):
        m_0 = library.sqrt(a)
        along = where(a == 0, 0.0, e / a)
        k = where(a == 0, 0.0, 1.0 + along)
        m = library.sqrt(k * k * a + P)
        difference = where(m + m_0 == 0, 0.0, (2 * e + along * e + P) / (m + m_0))
        turned = where(k > 0, P / (m * (m + k * m_0)), 1.0 - k * m_0 / m).clip(0.0, 2.0)
        turned = where((m_0 == 0) | (m <= least_left * m_0), NAN, turned)
        return [m_0, m, difference, turned, c, along * m_0]


def rescaled(units: Sequence[Array], P: Array, magnitude: Array) -> list[Array]:
    """DoRA (Eq. 5): the direction of the low-rank update, the magnitude |m|, the sign of m.

    A unit that m cannot scale, because the low-rank update left it zero or not finite, is that:
    zero, or not finite.

    Args:
        units: the six arrays of the low-rank update.
        P: its squared tangential part.
        magnitude: m.
    """
    m_0, turned_m, _, turned, _, radial = units
    library = library_of(m_0)
    where = library.where
    with np.errstate(all="ignore"):
        m = where(is_finite(turned_m), magnitude, NAN)
        m = where(turned_m == 0, 0.0, m)
        scale = where(m == 0, 0.0, m / turned_m)
        turned = where(m < 0, 2.0 - turned, turned)
        turned = where(m == 0, NAN, turned)
        radial = (scale - 1.0) * m_0 + scale * radial
        return [m_0, abs(m), abs(m) - m_0, turned, radial * radial + scale * scale * P, radial]


def terms(units: Sequence[Array]) -> list[Array]:
    """Of each unit what `measures` takes the sums of.

    Args:
        units: the six arrays, of any shape.

    Returns:
        `TERMS` arrays.
    """
    m_0, m, difference, turned, c, radial = units
    library = library_of(m_0)
    where = library.where
    with np.errstate(all="ignore"):
        finite = is_finite(m_0) & is_finite(m)
        directed = has_direction(turned, finite)
        measured = m_0 != 0
        moved = abs(difference)
        return [
            moved,
            where(directed, turned, 0.0),
            difference,
            where(measured, moved / m_0, 0.0),
            m_0,
            c,
            radial * radial,
            as_numbers(directed),
            as_numbers(measured),
            as_numbers(finite),
        ]


TERMS: Final = 10
DIRECTED: Final = 7
"""Which of the terms tells that a unit has a direction."""


def measures(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The measures of Eq. 3 and 4 and those beside them, of many weights.

    Args:
        sums: shape (TERMS, weights): the sums over the units of each.
        counts: shape (weights,): how many units each has.

    Returns:
        Shape (9, weights), in the order of `MEASURES`.
    """
    moved, turned, signed, relative, before, update, along, directed, measured, finite = sums
    with np.errstate(all="ignore"):
        means = np.stack(
            [
                moved / counts,
                turned / directed,
                signed / counts,
                relative / measured,
                before / counts,
                np.sqrt(update),
                np.where(update > 0, along / update, np.nan),
            ]
        )
    means = np.where(finite < counts, np.nan, means)
    return np.concatenate([means, [counts - directed, counts - finite]])


def has_direction(turned: Array, finite: Array) -> Array:
    """Which units have a direction both before and after: 1 − cos is a number.

    Args:
        turned: 1 − cos.
        finite: which units are; of the others nothing is said.
    """
    return ~(finite & library_of(turned).isnan(turned))


def named(names: Sequence[str], numbers: Sequence[float]) -> dict[str, Any]:
    """Numbers by their names, counts as whole numbers."""
    found: dict[str, Any] = dict(zip(names, numbers, strict=True))
    return found | {name: int(found[name]) for name in MEASURES[-2:]}
