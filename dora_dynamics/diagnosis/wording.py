"""A diagnosis in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_dynamics.diagnosis.measures import LARGEST_SHARE
from dora_dynamics.diagnosis.phrases import count, p_value

if TYPE_CHECKING:
    import pandas as pd

    from dora_dynamics.diagnosis.material import Material
    from dora_dynamics.diagnosis.rules import Placement, Statement, Verdict


@dataclass(frozen=True)
class Facts:
    """What the sentences are made from; see `Diagnosis` and `Material`."""

    verdict: Verdict
    statements: tuple[Statement, ...]
    table: pd.DataFrame
    placement: Placement | None
    material: Material
    lora: str
    ft: str
    error_level: float
    decays: bool
    decay_known: bool

    def measure(self, name: str) -> tuple[float, float, float]:
        """Value and bounds of a measure; NaN where it is missing."""
        row = self.table[self.table["measure"] == name]
        if row.empty:
            return (math.nan,) * 3
        value, low, high = row[["value", "low", "high"]].iloc[0]
        return float(value), float(low), float(high)


def findings(facts: Facts) -> tuple[str, ...]:
    """What the evidence says, one sentence or two each."""
    said = [_origin(facts)]
    inside = _interval(*facts.measure("r units"), "+.2f")
    said.append(f"{_across(facts)}; across the units inside a weight r {inside}.")
    signed, low, high = facts.measure("signed ΔM / m₀")
    if math.isfinite(signed):
        change = "shrink" if signed < 0 else "grow"
        bounds = (-high, -low) if signed < 0 else (low, high)  # of what the verb says
        said.append(
            f"Magnitudes {change} by {100 * abs(signed):.2g}% on the mean "
            f"[{_minus(f'{100 * bounds[0]:.2g}%, {100 * bounds[1]:.2g}%')}]; "
            f"{facts.measure('radial share')[0]:.1%} of the squared update lies along the units' "
            "own directions."
        )
    if facts.decays and facts.verdict != "decay":
        share, low, high = facts.measure("decay share")
        given = f"{share:.2f} [{low:.2f}, {high:.2f}] of ΔM"
        if share > LARGEST_SHARE - 0.005:
            given = "twice ΔM or more"
        said.append(f"Weight decay alone would give {given}.")
    if facts.placement is not None or facts.material.references:
        said.extend(_comparison(facts))
    return tuple(said)


def _across(facts: Facts) -> str:
    r = _interval(*facts.measure("r within_step"), "+.2f")
    slope = facts.measure("slope within_step")[0]
    if math.isnan(slope):
        return f"Across layers r {r}"
    return f"Across layers r {r}, slope {_minus(f'{slope:+.2g}')} m₀"


def _origin(facts: Facts) -> str:
    holding = [statement for statement in facts.statements if statement.holds]
    if not holding:
        return f"No statement about the origin of ΔM holds at the {facts.error_level:.0%} level."
    text = f"{holding[0].text} (p {p_value(holding[0].p_adjusted)})."
    if holding[0].mechanism == "decay":
        total = float(facts.material.own["total_decay"].max())
        share = facts.measure("decay share")[0]
        text = text[:-1] + (
            f": Λ = {total:.3g} takes {-math.expm1(-total):.1%} off a weight, and that is "
            f"{share:.2f} of ΔM."
        )
    return text[0].upper() + text[1:]


def _comparison(facts: Facts) -> list[str]:
    said = []
    placement = facts.placement
    if placement is not None and not math.isnan(placement.position):
        where = f"{placement.position:.2f} [{placement.low:.2f}, {placement.high:.2f}]"
        said.append(
            f"On the way from {facts.lora} (0) to {facts.ft} (1) it stands at {_minus(where)}."
        )
    elif placement is not None and facts.material.repeated:
        said.append(
            f"No measure tells {facts.ft} from {facts.lora} in these references, so that there is "
            "no scale to place it on."
        )
    for name in facts.material.references:
        column = f"{name} differs"
        if column not in facts.table:
            continue
        differing = facts.table.loc[facts.table[column], "measure"]
        listed = ", ".join(differing)
        said.append(
            f"It differs from {name} in {listed}."
            if listed
            else f"It differs from {name} in nothing that these runs can show."
        )
    return said


def advice(facts: Facts) -> tuple[str, ...]:
    """What to try next."""
    material = facts.material
    tips = []
    if facts.verdict == "decay":
        tips.append(
            "Run with weight decay 0 before reading anything into the slope: it is that of m₀."
        )
    if not facts.decay_known:
        tips.append(
            "Λ is not known, so that shrinking cannot be told from weight decay. dd.Recorder "
            "knows it of FT, LoRA and DoRA under AdamW. Otherwise train with weight decay 0, or "
            "fill the column total_decay with Σ lr·weight_decay."
        )
    if facts.verdict == "undecided":
        tips.append(
            f"Train longer, repeat with other seeds (there {_are(material.runs, 'run')}) or follow "
            f"more layers (there {_are(material.layers, 'layer')})."
        )
    elif material.runs == 1:
        tips.append("Repeat the run with two or more other seeds: one run hides how runs differ.")
    if not material.binding or facts.placement is None:
        wanted = [name for name in (facts.ft, facts.lora) if name != material.method]
        if material.binding:
            wanted = [name for name in wanted if name not in material.references]
        if wanted:
            tips.append(
                f"Record {' and '.join(wanted)} with the same model, data and recipe, and compare."
            )
    if facts.verdict == "LoRA-like":
        tips.append(
            "If magnitude and direction should move apart, give the magnitude a parameter of its "
            "own, as DoRA does."
        )
    if facts.verdict == "neither":
        tips.append("Look at the measures that differ, and at dora-dynamics plot, layer by layer.")
    return tuple(tips)


def _interval(value: float, low: float, high: float, form: str) -> str:
    """What stands behind the name of an estimate."""
    if math.isnan(value):
        return "is not defined"
    if math.isnan(low) or math.isnan(high):
        return _minus(f"= {value:{form}} (no interval)")
    return _minus(f"= {value:{form}} [{low:{form}}, {high:{form}}]")


def _minus(text: str) -> str:
    """Numbers with a true minus, as in the figures."""
    return text.replace("-", "−")


def _are(number: int, word: str) -> str:
    return f"{'is' if number == 1 else 'are'} {count(number, word)}"
