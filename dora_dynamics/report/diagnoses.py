"""Section "Diagnosis": where each method stands between LoRA and full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_dynamics.diagnosis import diagnose
from dora_dynamics.plotting._rows import in_order
from dora_dynamics.report.words import three_digits

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from pathlib import Path

    from dora_dynamics.diagnosis import Diagnosis
    from dora_dynamics.report.recorded import Recorded


@dataclass(frozen=True)
class MethodDiagnosis:
    """What the section says of one method.

    Attributes:
        method: its name.
        verdict: method and verdict in words.
        sure: how sure it is, and on how much.
        against: what it was compared with.
        found: what the evidence says.
        advice: what to try.
        limits: what limits the comparison.
        heading: columns of the table of evidence.
        rows: its rows, in words.
    """

    method: str
    verdict: str
    sure: str
    against: str
    found: tuple[str, ...]
    advice: tuple[str, ...]
    limits: tuple[str, ...]
    heading: list[str]
    rows: list[list[str]]


def diagnoses(recorded: Recorded, reference: Recorded | None) -> list[MethodDiagnosis]:
    """The diagnosis of every method of a report.

    It is compared with the runs of `reference`; without them with the report's runs of other
    methods; and where the report has one method alone, with the project's recorded runs.
    """
    methods = in_order(recorded.table["method"])
    paths = {method: _paths(recorded, method) for method in methods}
    found = []
    for method in methods:
        compared: Any = "recorded"
        against = "the project's own recorded runs"
        if reference is not None:
            compared = [run.path for run in reference.runs]
            against = ", ".join(run.name for run in reference.runs)
        elif len(methods) > 1:
            compared = [path for other in methods if other != method for path in paths[other]]
            against = "the other methods of this page"
        found.append(_in_words(diagnose(paths[method], compared, method=method), against))
    return found


def _paths(recorded: Recorded, method: str) -> list[Path]:
    return [run.path for run in recorded.runs if run.info.method == method]


def _in_words(diagnosis: Diagnosis, against: str) -> MethodDiagnosis:
    table = diagnosis.table
    ends = " difference low"
    names = [name.removesuffix(ends) for name in table.columns if name.endswith(ends)]
    return MethodDiagnosis(
        method=diagnosis.method,
        verdict=f"{diagnosis.method}: {diagnosis.verdict} ({diagnosis.meaning})",
        sure=diagnosis.certainty,
        against=against if names else "nothing",
        found=diagnosis.found,
        advice=diagnosis.advice,
        limits=diagnosis.warnings,
        heading=["measure", "what it is", diagnosis.method, *(f"{name}" for name in names)],
        rows=[_row(row, names) for row in table.to_dict("records")],
    )


def _row(row: Mapping[Hashable, Any], names: list[str]) -> list[str]:
    cells = [str(row["measure"]), str(row["meaning"])]
    cells.append(_estimate(row["value"], row["low"], row["high"]))
    for name in names:
        differs = " (differs)" if row.get(f"{name} differs") else ""
        cells.append(f"{_number(row[name])}{differs}")
    return cells


def _estimate(value: float, low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return _number(value)
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return three_digits(value) if np.isfinite(value) else "–"
