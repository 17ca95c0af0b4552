"""`diagnose`: read, compare, decide, say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pandas as pd

from dora_dynamics.diagnosis import rules, wording
from dora_dynamics.diagnosis.inference import Inference, infer, replicate
from dora_dynamics.diagnosis.material import Material, gather
from dora_dynamics.diagnosis.measures import MEASURES
from dora_dynamics.diagnosis.readings import Readings
from dora_dynamics.diagnosis.result import Diagnosis
from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from dora_dynamics.correlation import FloatArray
    from dora_dynamics.diagnosis.inference import Replicates
    from dora_dynamics.diagnosis.material import Runs
    from dora_dynamics.diagnosis.result import Confidence

_OWN: Final = "\0own"  # no method of a table is called so
_SAME_ROLES: Final = "\0own, roles of the references"


def diagnose(
    trajectory: Runs,
    reference: Runs | Literal["recorded"] | None = "recorded",
    *,
    method: str | None = None,
    lora: str = "LoRA",
    ft: str = "FT",
    checkpoints: int = 4,
    error_level: float = 0.05,
    resamples: int = 1000,
    seed: int = 0,
) -> Diagnosis:
    """Place a method between LoRA and full fine-tuning, with the evidence for it.

    **What makes ΔM.** With d = 1 − exp(−Λ), the share of a weight that decay has taken, and
    T = ΔD/(1 − ΔD), what an update orthogonal to w_0 adds to its norm, five statements are tested:

    | statement | holds if all of these do |
    |---|---|
    | decay alone | signed ΔM within 25% of −d·m_0; d·m_0 over half of ΔM; signed ΔM/ΔM < −½ |
    | decay and turning | the same with ((1 − d)/(1 − ΔD) − 1)·m_0 |
    | turning | r across units > 0; magnitudes grow, decay made good; own radial share < 0.05 |
    | own movement | own radial share > 0.05 |
    | against the turning | r across units < 0; d·m_0 under half of ΔM |

    The own radial share is that of the update along the units' own directions and not by decay. An
    update of no preferred direction puts 1/in of its square there: with more than some 40 inputs,
    chance does not reach 0.05. With fewer do not trust "own movement" (of units of 16 inputs, and
    below, noise is called FT-like): the table does not hold how many there are. Where Λ is not
    known, decay is not tested, and the last two ask that the weights do not mostly shrink. A
    statement has the largest p-value of its parts; Holm's correction keeps the probability of any
    false statement below `error_level`. `decay` comes first, then "LoRA-like" for turning,
    "FT-like" for the last two.

    **Against references.** Every measure of the table is compared with that of each reference
    method; a difference counts if it is larger than the measure's margin (`measures.MEASURES`) by
    a one-sided test on both sides, Holm's correction over the measures of one reference keeping
    the probability of any false difference below `error_level`. What follows for the verdict is in
    `rules.decide`. With one run on every side no difference counts, as nothing tells how runs
    differ; where one side has several runs, they stand in for the other. `reference="recorded"`
    takes the project's runs on MiniLM, with or without decay as the method was trained: for a
    first look, since a difference can be that of the recipe. Such a comparison does not enter the
    verdict.

    Intervals and tests draw whole layers (those of the same pre-trained weights for all methods at
    once) and whole runs again, with Student's t (`inference.infer`).

    Measured on 100 draws of runs whose kind is known (`analyses.diagnosis_simulation`; 6 and 12
    layers, 1 to 5 runs): the verdict was right in 98 or more of 100, a statement false in 2 or
    fewer, a difference never. A low-rank update of random direction that changes units by less than
    10% is beyond that: in one run of six small layers it may stay "undecided".

    Args:
        trajectory: the rows of the method, or its run directories. From directories of runs with
            `keep="weights"` the effective rank of ΔW is measured too.
        reference: rows or run directories of reference methods; "recorded"; None for none. Other
            methods in `trajectory`, where `method` is named, are references as well.
        method: the method to diagnose, where `trajectory` holds several.
        lora: name of the LoRA method among the references.
        ft: name of full fine-tuning among the references.
        checkpoints: late checkpoints of each run that are used, as in the paper.
        error_level: see above.
        resamples: resamples of the bootstrap.
        seed: of the resamples.

    Returns:
        The diagnosis; `print` it.

    Raises:
        InputError: columns are missing, the method is not there or not named, an option is out of
            range, or two rows describe one point.
    """
    if not 0 < error_level < 0.5:
        raise InputError(f"error_level must lie between 0 and 0.5; got {error_level}.")
    if resamples < 100 or checkpoints < 1:
        raise InputError("resamples must be at least 100 and checkpoints at least 1.")
    material = gather(trajectory, reference, method, checkpoints)
    if material.lacking:
        return _nothing(material, error_level)

    replicates = _replicates(material, resamples, seed)
    own = replicates[_OWN]
    compared = replicates[_SAME_ROLES]
    known = bool(material.own["total_decay"].notna().all())
    decays = known and bool((material.own["total_decay"] > 0).any())
    read = infer(lambda estimates: estimates[0], [own])
    tested = rules.statements(read, decay_known=known, decays=decays, error_level=error_level)
    mechanism: rules.Mechanism = next((s.mechanism for s in tested if s.holds), "none")

    against = {name: replicates[name] for name in material.references}
    differences = rules.compare(compared, against)
    placement = _placement(material, compared, against, differences, lora, ft, error_level)
    binding = material.binding
    verdict = rules.decide(mechanism, placement, lora=lora, ft=ft, binding=binding)
    evidence = _evidence(read, against, differences, error_level, material.repeated)
    p_value = _deciding_p(verdict, mechanism, tested, differences, lora, ft)
    facts = wording.Facts(
        verdict=verdict,
        statements=tested,
        table=evidence,
        placement=placement,
        material=material,
        lora=lora,
        ft=ft,
        error_level=error_level,
        decays=decays,
        decay_known=known,
    )
    return Diagnosis(
        method=material.method,
        verdict=verdict,
        confidence=_confidence(verdict, p_value, material.runs),
        p_value=p_value,
        table=evidence,
        statements=tested,
        placement=placement,
        found=wording.findings(facts),
        advice=wording.advice(facts),
        warnings=material.notes,
        layers=material.layers,
        runs=material.runs,
        steps=material.steps,
        error_level=error_level,
    )


def _nothing(material: Material, error_level: float) -> Diagnosis:
    """The diagnosis of what cannot be diagnosed."""
    columns = ["measure", "meaning", "scale", "value", "low", "high"]
    return Diagnosis(
        method=material.method,
        verdict="not enough data",
        confidence="none",
        p_value=float("nan"),
        table=pd.DataFrame(columns=columns),
        statements=(),
        placement=None,
        found=tuple(lack.found for lack in material.lacking),
        advice=tuple(lack.advice for lack in material.lacking),
        warnings=material.notes,
        layers=material.layers,
        runs=material.runs,
        steps=material.steps,
        error_level=error_level,
    )


def _replicates(material: Material, resamples: int, seed: int) -> dict[str, Replicates]:
    """Of the method, of the part of it that can be compared, and of the references."""
    tables = {_OWN: material.own}
    if material.references and len(material.compared) < len(material.own):
        tables[_SAME_ROLES] = material.compared
    tables |= material.references
    layers = material.layer_numbers(tables)
    readings = {
        name: Readings.of(table, numbers)
        for (name, table), numbers in zip(tables.items(), layers, strict=True)
    }
    rng = np.random.default_rng(seed)
    found = replicate(readings, material.paired, resamples, rng)
    return {_SAME_ROLES: found[_OWN]} | found


def _placement(
    material: Material,
    own: Replicates,
    against: dict[str, Replicates],
    differences: dict[str, rules.Difference],
    lora: str,
    ft: str,
    error_level: float,
) -> rules.Placement | None:
    if lora not in against or ft not in against:
        return None
    differs = {
        name: difference.named(error_level) if material.repeated else None
        for name, difference in differences.items()
    }
    where = rules.position(own, against[lora], against[ft], error_level)
    if where is None or not material.repeated:
        nan = float("nan")
        return rules.Placement(nan, nan, nan, differs)
    low, high = where.interval(1 - error_level)
    return rules.Placement(float(where.centre[0]), float(low[0]), float(high[0]), differs)


def _evidence(
    read: Inference,
    against: dict[str, Replicates],
    differences: dict[str, rules.Difference],
    error_level: float,
    repeated: bool,
) -> pd.DataFrame:
    """The table of `Diagnosis`, the measures that no one has left out."""
    number = len(MEASURES)
    low, high = read.interval(1 - error_level)
    columns: dict[str, list[object]] = {
        "measure": [measure.name for measure in MEASURES],
        "meaning": [measure.meaning for measure in MEASURES],
        "scale": [measure.scale for measure in MEASURES],
        "value": _restored(read.centre),
        "low": _restored(low),
        "high": _restored(high),
    }
    for name, reference in against.items():
        difference = differences[name]
        low, high = difference.away.interval(1 - error_level)
        columns[name] = _restored(reference.centre)
        columns[f"{name} difference"] = [float(x) for x in difference.away.centre[:number]]
        columns[f"{name} difference low"] = [float(x) for x in low[:number]]
        columns[f"{name} difference high"] = [float(x) for x in high[:number]]
        if repeated:
            columns[f"{name} p"] = [float(p) for p in difference.adjusted]
            columns[f"{name} differs"] = [bool(p < error_level) for p in difference.adjusted]
    table = pd.DataFrame(columns)
    values = table[["value", *against]]
    return table[values.notna().any(axis=1)].reset_index(drop=True)


def _restored(values: FloatArray) -> list[object]:
    return [float(m.restore(v)) for m, v in zip(MEASURES, values, strict=False)]


def _deciding_p(
    verdict: rules.Verdict,
    mechanism: rules.Mechanism,
    statements: tuple[rules.Statement, ...],
    differences: dict[str, rules.Difference],
    lora: str,
    ft: str,
) -> float:
    """The adjusted p-value of what the verdict rests on: a statement, or differences."""
    agreeing = {"decay": "decay", "LoRA-like": "turning", "FT-like": "own magnitude"}
    if agreeing.get(verdict) == mechanism:
        return min(s.p_adjusted for s in statements if s.holds and s.mechanism == mechanism)
    apart = {"LoRA-like": [ft], "FT-like": [lora], "neither": [ft, lora], "between": [ft, lora]}
    told = [differences[name] for name in apart.get(verdict, []) if name in differences]
    return max((float(np.nanmin(d.adjusted)) for d in told), default=float("nan"))


def _confidence(verdict: rules.Verdict, p_value: float, runs: int) -> Confidence:
    if verdict == "undecided" or np.isnan(p_value):
        return "none" if verdict == "undecided" else "low"
    if p_value < 0.001 and runs > 1:
        return "high"
    return "moderate" if p_value < 0.01 else "low"
