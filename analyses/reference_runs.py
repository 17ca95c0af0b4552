"""Run: `python -m analyses.reference_runs RUN...`, after `analyses.reproduce` as below.

Packages runs of FT, LoRA and DoRA as the reference that `dd.diagnose` compares with for a first
look. Four late checkpoints of each run go into `dora_dynamics/data/reference_runs.csv`; what was
run, by what, goes into `reference_runs.json` beside it. Runs with weight decay are those of a
recipe with any (`total_decay` above 0), whatever Λ their followed weights see.

    python -m analyses.reproduce --seeds 5 --name decay
    python -m analyses.reproduce --seeds 5 --weight-decay 0 --name no_decay
    python -m analyses.reference_runs runs/decay/* runs/no_decay/*
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

import dora_dynamics as dd
from dora_dynamics import provenance
from dora_dynamics.diagnosis.effective_rank import load_with_rank
from dora_dynamics.diagnosis.references import ABOUT, TABLE
from dora_dynamics.errors import InputError
from dora_dynamics.runs.directory import read_info

if TYPE_CHECKING:
    from collections.abc import Sequence

METHODS = ("FT", "LoRA", "DoRA")


def recipe(path: Path) -> dict[str, Any]:
    """The recipe that `analyses.reproduce` wrote into a run."""
    given: dict[str, Any] = read_info(path).hyperparameters.get("recipe", {})
    if "total_decay" not in given:
        raise InputError(f"{path} was not recorded by analyses.reproduce: run.json has no recipe.")
    return given


def package(paths: Sequence[Path]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table and what it is from.

    Raises:
        InputError: with or without decay, a method is missing.
    """
    tables, about = [], []
    for decays in (True, False):
        chosen = [path for path in paths if (recipe(path)["total_decay"] > 0) == decays]
        infos = [read_info(path) for path in chosen]
        missing = sorted(set(METHODS) - {info.method for info in infos})
        if missing:
            word = "with" if decays else "without"
            raise InputError(f"no run {word} weight decay of {', '.join(missing)}.")
        late = dd.select_checkpoints(load_with_rank(chosen), count=4, kind="late")
        late = late.assign(run=[Path(name).name for name in late["run"]], decays=decays)
        tables.append(late)
        for method in METHODS:
            runs = [info for info in infos if info.method == method]
            path = chosen[infos.index(runs[0])]
            about.append(
                {
                    "method": method,
                    "decays": decays,
                    "runs": len(runs),
                    "seeds": [info.seed for info in runs],
                    "recipe": recipe(path),
                    "model": runs[0].model,
                    "axis": runs[0].axis,
                    "versions": runs[0].versions,
                    "machine": runs[0].machine,
                    "created": runs[0].created,
                }
            )
    table = pd.concat(tables, ignore_index=True)
    return table, {"runs": about, "packaged_with": provenance.versions()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the packaged data."""
    parser = argparse.ArgumentParser(description="Package reference runs for dd.diagnose.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("dora_dynamics") / "data")
    options = parser.parse_args(arguments)
    table, about = package(options.runs)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / TABLE, index=False, float_format="%.6g")
    (options.out / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    print(table.groupby(["decays", "method"])["run"].nunique().to_string())
    print(f"Wrote {options.out / TABLE} and {options.out / ABOUT}")


if __name__ == "__main__":
    main()
