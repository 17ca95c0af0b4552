"""Section "What was run": the runs side by side, as their `run.json` tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dora_dynamics.report.recorded import Recorded, Run


@dataclass(frozen=True)
class Facts:
    """What the section shows.

    Attributes:
        runs: names of the runs, the columns of its table.
        lines: a title and what it is for each run; one value where it is the same for all.
        details: for each run, its hyperparameters and versions as JSON text.
    """

    runs: list[str]
    lines: list[tuple[str, list[str]]]
    details: list[tuple[str, str]]


def facts(recorded: Recorded) -> Facts:
    """Everything a reader needs to know of the runs beside their rows."""
    columns = [_described(run, recorded) for run in recorded.runs]
    lines = []
    for title in columns[0]:
        values = [column[title] for column in columns]
        lines.append((title, values[:1] if len(set(values)) == 1 else values))
    details = [
        (
            run.name,
            json.dumps(
                {
                    "hyperparameters": run.info.hyperparameters,
                    "targets": run.info.targets,
                    "versions": run.info.versions,
                },
                indent=2,
                ensure_ascii=False,
            ),
        )
        for run in recorded.runs
    ]
    return Facts([run.name for run in recorded.runs], lines, details)


def _described(run: Run, recorded: Recorded) -> dict[str, str]:
    info, rows = run.info, recorded.table[recorded.table["run"] == run.name]
    steps = rows["step"].unique()
    heads = " by attention head" if rows["head"].notna().any() else ""
    return {
        "method": info.method,
        "model": info.model,
        "baseline W₀": info.baseline,
        "weights": f"{rows['site'].nunique():,}{heads}; targets {', '.join(info.targets)}",
        "axis": f"{info.axis} units",
        "steps": f"{len(steps):,} recorded, from {steps.min():,} to {steps.max():,}",
        "rows": f"{len(rows):,}",
        "seed": "not noted" if info.seed is None else str(info.seed),
        "recorded": info.created,
        "machine": info.machine,
        "kept beside the table": ", ".join(info.keep) or "nothing",
        "folder": run.path.as_posix(),
    }
