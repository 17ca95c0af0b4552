"""The decision rules of a diagnosis, each with its error level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from dora_dynamics.diagnosis.inference import Inference, difference, holm, infer
from dora_dynamics.diagnosis.measures import MEASURES
from dora_dynamics.diagnosis.readings import INDEX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dora_dynamics.correlation import FloatArray
    from dora_dynamics.diagnosis.inference import Replicates

Mechanism = Literal["decay", "turning", "own magnitude", "none"]
Verdict = Literal[
    "LoRA-like", "FT-like", "between", "neither", "decay", "undecided", "not enough data"
]

FIT: Final = 0.25  # how far ΔM may be from what a prediction gives, relative to it
RADIAL: Final = 0.05  # share of an update along w_0 that chance does not reach
SHRINKING: Final = -0.5  # signed ΔM over ΔM of weights that shrink for the most part
LARGER_PART: Final = 0.5  # of ΔM


@dataclass(frozen=True)
class Statement:
    """One thing that a rule can find, and how sure it is.

    Attributes:
        name: short name.
        mechanism: what makes ΔM if it holds.
        text: the statement.
        p_value: largest of the one-sided p-values of its parts; NaN where it cannot be tested.
        p_adjusted: the same after Holm's correction over all statements.
        holds: whether it is below the error level.
    """

    name: str
    mechanism: Mechanism
    text: str
    p_value: float
    p_adjusted: float
    holds: bool


@dataclass(frozen=True)
class Placement:
    """Where a method stands between two references.

    Attributes:
        position: 0 at the LoRA reference, 1 at FT; NaN where the two cannot be told apart.
        low: lower bound of its interval.
        high: upper bound.
        differs: for each reference method, the measures in which it differs; None where no run was
            repeated, so that differences cannot be told from those of two runs of one method.
    """

    position: float
    low: float
    high: float
    differs: Mapping[str, tuple[str, ...] | None]


def statements(
    read: Inference, *, decay_known: bool, decays: bool, error_level: float
) -> tuple[Statement, ...]:
    """What makes ΔM: every statement tested, at one family-wise error level.

    Args:
        read: the measures of the method, in the order of `readings.COLUMNS`.
        decay_known: whether Λ is known for all rows.
        decays: whether it is above zero anywhere.
        error_level: probability of one false statement or more.
    """

    def above(name: str, bound: float) -> float:
        return float(read.above(bound)[INDEX[name]])

    def below(name: str, bound: float) -> float:
        return float(read.below(bound)[INDEX[name]])

    def by_decay(fit: str) -> float:
        return _all_of(
            above(fit, 1 - FIT),
            below(fit, 1 + FIT),
            below("signed ΔM / ΔM", SHRINKING),
            above("decay share", LARGER_PART),
        )

    nan = float("nan")
    not_decay = below("decay share", LARGER_PART) if decay_known else nan
    not_shrinking = above("signed ΔM / ΔM", SHRINKING)
    tested: list[tuple[str, Mechanism, str, float]] = [
        (
            "decay alone",
            "decay",
            "ΔM is what weight decay alone gives",
            by_decay("decay fit") if decays else nan,
        ),
        (
            "decay and turning",
            "decay",
            "ΔM is what weight decay and the turning of the weights give",
            by_decay("decay and turning fit") if decays else nan,
        ),
        (
            "turning",
            "turning",
            "ΔM comes with the update: units that turn more change their magnitude more, they grow "
            "more than they shrink, and the magnitude has no movement of its own",
            _all_of(
                below("own radial share" if decay_known else "radial share", RADIAL),
                above("r units", 0.0),
                above("growth" if decay_known else "signed ΔM / ΔM", 0.0),
            ),
        ),
        (
            "own movement",
            "own magnitude",
            "the magnitude moves on its own: more of the update lies along the units' own "
            "directions than decay puts there, or chance where units have 40 inputs or more",
            above("own radial share", RADIAL)
            if decay_known
            else _all_of(above("radial share", RADIAL), not_shrinking),
        ),
        (
            "against the turning",
            "own magnitude",
            "units that turn more change their magnitude less, and decay does not explain it",
            _all_of(below("r units", 0.0), not_decay if decay_known else not_shrinking),
        ),
    ]
    adjusted = holm(np.array([p for *_, p in tested]))
    return tuple(
        Statement(name, mechanism, text, p, float(q), bool(q < error_level))
        for (name, mechanism, text, p), q in zip(tested, adjusted, strict=True)
    )


def _all_of(*p_values: float) -> float:
    """p-value of several statements at once: the largest (an intersection-union test)."""
    return float(np.max(p_values))  # NaN where one is not testable


@dataclass(frozen=True)
class Difference:
    """How the measures of a method differ from those of one reference.

    Attributes:
        away: the differences, in the order of `readings.COLUMNS`.
        adjusted: p-values of a difference beyond the margin after Holm's correction over the
            measures, in the order of `MEASURES`; NaN for those that are not compared.
    """

    away: Inference
    adjusted: FloatArray

    def named(self, error_level: float) -> tuple[str, ...]:
        """The measures that differ."""
        return tuple(
            measure.name
            for measure, p in zip(MEASURES, self.adjusted, strict=True)
            if p < error_level
        )


def compare(method: Replicates, references: Mapping[str, Replicates]) -> dict[str, Difference]:
    """The difference of a method from every reference."""
    found = {}
    for name, reference in references.items():
        away = difference(method, reference)
        found[name] = Difference(away, _beyond_margins(away))
    return found


def _beyond_margins(away: Inference) -> FloatArray:
    margins = np.full(len(away.centre), np.nan)
    margins[: len(MEASURES)] = [measure.margin for measure in MEASURES]
    return holm(away.beyond(margins)[: len(MEASURES)])


def position(
    method: Replicates, lora: Replicates, ft: Replicates, error_level: float
) -> Inference | None:
    """Where a method stands on the way from LoRA (0) to FT (1); None where there is no such way.

    The mean over the measures in which the two references differ by more than the margin (Holm, at
    the error level) of (method − LoRA)/(FT − LoRA), each held within −1 to 2.
    """
    apart = _beyond_margins(difference(ft, lora)) < error_level
    used = np.flatnonzero(apart & np.isfinite(method.centre[: len(MEASURES)]))
    if not used.size:
        return None

    def along(estimates: Sequence[FloatArray]) -> FloatArray:
        own, start, end = (e[:, used] for e in estimates)
        mean: FloatArray = np.clip((own - start) / (end - start), -1, 2).mean(axis=1, keepdims=True)
        return mean

    return infer(along, [method, lora, ft])


def decide(
    mechanism: Mechanism, placement: Placement | None, *, lora: str, ft: str, binding: bool
) -> Verdict:
    """The verdict, from what makes ΔM and from the comparison with the references.

    | what makes ΔM | differs from LoRA only | from FT only | from both | from neither, or unknown |
    |---|---|---|---|---|
    | decay | decay | decay | decay | decay |
    | turning | FT-like | LoRA-like | LoRA-like if nearer to it, else between | LoRA-like |
    | own magnitude | FT-like | LoRA-like | FT-like if nearer to it, else between | FT-like |
    | none | FT-like | LoRA-like | neither | undecided |

    "Nearer" is a position whose interval lies on one side of ½, and "between" one whose interval
    lies inside 0 to 1; what is none of these is "neither". References of another recipe (`binding`
    False) do not enter: differences from them can be the recipe's.
    """
    if mechanism == "decay":
        return "decay"
    alone: dict[Mechanism, Verdict] = {"turning": "LoRA-like", "own magnitude": "FT-like"}
    told = placement.differs if placement is not None and binding else {}
    from_lora, from_ft = told.get(lora), told.get(ft)
    if placement is None or from_lora is None or from_ft is None:
        return alone.get(mechanism, "undecided")
    if from_lora and not from_ft:
        return "FT-like"
    if from_ft and not from_lora:
        return "LoRA-like"
    if not from_lora:
        return alone.get(mechanism, "undecided")
    if mechanism == "none":
        return "neither"
    if mechanism == "turning" and placement.high < 0.5:
        return "LoRA-like"
    if mechanism == "own magnitude" and placement.low > 0.5:
        return "FT-like"
    return "between" if placement.low > 0 and placement.high < 1 else "neither"
