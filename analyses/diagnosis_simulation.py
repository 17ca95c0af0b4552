"""Run: `python -m analyses.diagnosis_simulation` (100 draws; `--quick` for 3).

How often `diagnose` is right where the truth is known, and how often its alarms are false. Every
draw takes new pre-trained weights and, for each of the four kinds of `analyses.synthetic_runs`,
six runs of a method drawn from the kind's range, measured from weights. The same draw is diagnosed
with 6 and 12 layers: alone, with 1 and 5 runs, and with 3 runs against 3 runs of turning ("LoRA"),
of own magnitude ("FT") and of the very same method ("same").

- right: turning is called LoRA-like, own magnitude FT-like, decay decay, and noise is not placed.
- false statement: any statement about the origin of ΔM that is not the truth holds.
- false difference: any measure is called different from the runs of the same method.

Writes analyses/results/diagnosis_simulation.csv and figures/diagnosis_simulation.{png,svg}.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter
from scipy import stats
from tqdm import tqdm

import dora_dynamics as dd
from analyses._results import write_tables
from analyses.synthetic_runs import KINDS, Design, Kind, pretrained, study
from dora_dynamics import provenance
from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.figure import Figure

    from dora_dynamics.diagnosis import Diagnosis

RIGHT: Final[dict[Kind, tuple[str, ...]]] = {
    "turning": ("LoRA-like",),
    "own magnitude": ("FT-like",),
    "decay": ("decay",),
    "noise": ("undecided", "neither"),
}
LAYERS: Final = (6, 12)
SETTINGS: Final = tuple(
    (mode, runs, layers, colour, marker)
    for mode, runs, colour in (
        ("alone", 1, "#0072B2"),
        ("alone", 5, "#D55E00"),
        ("with references", 3, "#009E73"),
    )
    for layers, marker in ((6, "o"), (12, "s"))
)
WIDTH, HEIGHT = 7.5, 3.8
ALT: Final = (
    "Shares of draws with a right verdict, with a false statement and with a false difference, "
    "for four kinds of runs in six settings, with 95% intervals and lines at 95% and 5%."
)


def draw(number: int, resamples: int, seed: int) -> Iterator[dict[str, object]]:
    """All diagnoses of one draw."""
    rng = np.random.default_rng([seed, number])
    weights = pretrained(max(LAYERS), rng)
    tables = {kind: study(Design.drawn(kind, rng), weights, 6, rng, kind) for kind in KINDS}
    for kind in KINDS:
        for layers in LAYERS:
            for runs in (1, 5):
                own = _part(tables[kind], layers, range(runs))
                found = dd.diagnose(own, reference=None, resamples=resamples)
                yield _outcome(kind, layers, runs, "alone", found)
            references: dict[str, Kind] = {"LoRA": "turning", "FT": "own magnitude", "same": kind}
            against = pd.concat(
                [
                    _part(tables[other], layers, (3, 4, 5)).assign(method=name)
                    for name, other in references.items()
                ]
            )
            own = _part(tables[kind], layers, range(3))
            found = dd.diagnose(own, reference=against, resamples=resamples)
            yield _outcome(kind, layers, 3, "with references", found)


def _part(table: pd.DataFrame, layers: int, runs: Sequence[int]) -> pd.DataFrame:
    """Some runs and the first layers of a table."""
    method = table["method"].iloc[0]
    chosen = table["run"].isin([f"{method}-seed{run}" for run in runs])
    return table.loc[chosen & (table["layer"] < layers)]


def _outcome(kind: Kind, layers: int, runs: int, mode: str, found: Diagnosis) -> dict[str, object]:
    holding = {statement.mechanism for statement in found.statements if statement.holds}
    differing = found.table["same differs"].any() if mode == "with references" else None
    return {
        "kind": kind,
        "layers": layers,
        "runs": runs,
        "mode": mode,
        "verdict": found.verdict,
        "right": found.verdict in RIGHT[kind],
        "false_statement": bool(holding - {kind}),
        "false_difference": differing,
    }


def summary(outcomes: pd.DataFrame) -> pd.DataFrame:
    """For each setting the shares, with exact 95% intervals, and how often each verdict came."""
    rows = []
    settings = ["mode", "kind", "layers", "runs"]
    for key, group in outcomes.groupby(settings, sort=False):
        row: dict[str, object] = dict(zip(settings, key, strict=True)) | {"draws": len(group)}
        for name in ("right", "false_statement", "false_difference"):
            known = group[name].dropna().astype(bool)
            if known.empty:
                continue
            bounds = stats.binomtest(int(known.sum()), len(known)).proportion_ci()
            row |= {name: known.mean(), f"{name}_low": bounds.low, f"{name}_high": bounds.high}
        row["verdicts"] = "; ".join(f"{v} {n}" for v, n in group["verdict"].value_counts().items())
        rows.append(row)
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> Figure:
    """The share of right verdicts and of false alarms in every setting."""
    panels = (
        ("right", "right verdicts", 0.95, (0.78, 1.01)),
        ("false_statement", "false statements", 0.05, (-0.01, 0.22)),
        ("false_difference", "false differences", 0.05, (-0.01, 0.22)),
    )
    drawn, axes = plt.subplots(1, 3, figsize=(WIDTH, HEIGHT), sharey=True, layout="constrained")
    for ax, (name, title, level, limits) in zip(axes, panels, strict=True):
        ax.axvline(level, color="0.5", linewidth=0.8, linestyle="--")
        for k, (mode, runs, layers, colour, marker) in enumerate(SETTINGS):
            here = (table["mode"] == mode) & (table["runs"] == runs) & (table["layers"] == layers)
            known = table[here].dropna(subset=[name])
            ax.errorbar(
                known[name],
                known["kind"].map(KINDS.index).astype(float) + 0.13 * (k - (len(SETTINGS) - 1) / 2),
                xerr=[known[name] - known[f"{name}_low"], known[f"{name}_high"] - known[name]],
                fmt=marker,
                color=colour,
                markersize=4,
                linewidth=0.8,
                label=f"{mode}, {runs} run{'s' * (runs > 1)}, {layers} layers",
            )
        ax.set(xlabel="share of draws", title=title, xlim=limits)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(KINDS)), KINDS)
    axes[0].set_ylim(len(KINDS) - 0.5, -0.5)
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, write the table and the figure, print the table."""
    parser = argparse.ArgumentParser(description="How often a diagnosis is right.")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="3 draws, for the tests")
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in")
    options = parser.parse_args(arguments)
    numbers = range(3 if options.quick else options.draws)
    outcomes = [
        outcome
        for number in tqdm(numbers, desc="draws", disable=None)
        for outcome in draw(number, options.resamples, options.seed)
    ]
    table = summary(pd.DataFrame(outcomes))
    table = table.assign(
        resamples=options.resamples,
        seed=options.seed,
        numpy=provenance.versions()["numpy"],
        machine=provenance.machine(),
    )
    write_tables(options.out, "diagnosis_simulation", {"": table}, digits=4)
    save(figure(table), options.out / "figures" / "diagnosis_simulation", alt=ALT)
    shown = ["mode", "kind", "layers", "runs", "right", "false_statement", "false_difference"]
    print(table[[*shown, "verdicts"]].to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
