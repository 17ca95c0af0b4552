"""What a diagnosis gives: the evidence, the verdict, how sure it is, and what to try."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from dora_dynamics.diagnosis import phrases

if TYPE_CHECKING:
    import pandas as pd

    from dora_dynamics.diagnosis.rules import Placement, Statement, Verdict

Confidence = Literal["high", "moderate", "low", "none"]

_WIDTH: Final = 96
_MEANS: Final = {
    "LoRA-like": "the magnitude changes as the update changes, as in LoRA",
    "FT-like": "the magnitude changes apart from the direction, as in full fine-tuning",
    "between": "between LoRA and full fine-tuning",
    "neither": "unlike both references",
    "decay": "ΔM is the work of weight decay; it says nothing of the method",
    "undecided": "these runs do not tell",
    "not enough data": "there is nothing to decide on",
}


@dataclass(frozen=True)
class Diagnosis:
    """Where a method stands between LoRA and full fine-tuning, and on what evidence.

    `print(diagnosis)` says all of it in plain words.

    Attributes:
        method: the method that was diagnosed.
        verdict: "LoRA-like" (the magnitude changes with the update), "FT-like" (it changes on its
            own), "between", "neither", "decay" (ΔM is what weight decay gives, so that it says
            nothing of the method), "undecided", or "not enough data".
        confidence: "high" where the rule that decided has an adjusted p-value below 0.001 and runs
            were repeated, "moderate" below 0.01, "low" below the error level, "none" where nothing
            was decided.
        p_value: that adjusted p-value; NaN where no single rule decided.
        table: the evidence, one row a measure: `measure`, `meaning`, `value` with `low` and
            `high`, and for every reference method its value in a column of its name, and
            `… difference`, `… difference low`, `… difference high`, `… p` (adjusted, of a
            difference beyond the margin) and `… differs`. Differences are on `scale`: Fisher's z
            for correlations (Cohen's q), asinh for slopes.
        statements: what was tested about the origin of ΔM.
        placement: where the method stands between the references; None without both of them.
        found: sentences: what the evidence says.
        advice: sentences: what to try next.
        warnings: sentences: what limits the comparison.
        layers: how many layers, the things that vary.
        runs: how many runs.
        steps: the checkpoints that were used.
        error_level: family-wise probability of a false statement, and of a false difference from
            each reference.
    """

    method: str
    verdict: Verdict
    confidence: Confidence
    p_value: float
    table: pd.DataFrame
    statements: tuple[Statement, ...]
    placement: Placement | None
    found: tuple[str, ...]
    advice: tuple[str, ...]
    warnings: tuple[str, ...]
    layers: int
    runs: int
    steps: tuple[int, ...]
    error_level: float

    @property
    def meaning(self) -> str:
        """The verdict in words."""
        return _MEANS[self.verdict]

    @property
    def certainty(self) -> str:
        """How sure the verdict is and on how much, as a sentence."""
        basis = (
            f"{phrases.count(self.layers, 'layer')}, {phrases.count(self.runs, 'run')}, "
            f"{phrases.count(len(self.steps), 'checkpoint')}"
        )
        if self.confidence == "none":
            return f"Confidence: none, from {basis}."
        p = "" if math.isnan(self.p_value) else f"p {phrases.p_value(self.p_value)}, "
        return (
            f"Confidence: {self.confidence} ({p}from {basis}; false statements in at most "
            f"{self.error_level:.0%} of such diagnoses)."
        )

    def __str__(self) -> str:
        return _in_words(self)


def _in_words(diagnosis: Diagnosis) -> str:
    """The whole diagnosis, as `print` shows it."""
    lines = [
        f"{diagnosis.method}: {diagnosis.verdict} ({diagnosis.meaning}).",
        diagnosis.certainty,
    ]
    for title, sentences in (
        ("Found", diagnosis.found),
        ("To try", diagnosis.advice),
        ("Mind", diagnosis.warnings),
    ):
        if sentences:
            lines.append(f"{title}:")
            lines += [
                textwrap.fill(s, _WIDTH, initial_indent="- ", subsequent_indent="  ")
                for s in sentences
            ]
    return "\n".join(lines)
