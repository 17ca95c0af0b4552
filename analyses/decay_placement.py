"""Run: `python -m analyses.decay_placement` (full: `--seeds 5 --steps 500 --batch-size 128`).

Which of DoRA's parameters has to decay for the coupling to turn? The same fine-tuning with the
total weight decay Λ on all of them, on the magnitude m alone, or on the factors A and B alone;
runs without decay are common to the three.

Writes figures/decay_placement.{png,svg}, and analyses/results/decay_placement.csv (the coupling and
the mean change of magnitude of each condition) and .json.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

import pandas as pd

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._results import write_tables
from analyses.finetuning import sweep
from analyses.finetuning.recipe import LEARNING_RATES, Recipe
from analyses.finetuning.sweep import Job
from analyses.weight_decay import ROLES, TOTALS
from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from analyses.finetuning.recipe import DecayOn
    from dora_dynamics.statistics import Level

PLACES: Final[dict[DecayOn, str]] = {
    "all": "all of m, A, B",
    "magnitude": "m alone",
    "factors": "A and B alone",
}
LOOKS: Final = {
    "all": ("#333333", "o"),
    "magnitude": ("#b2182b", "s"),
    "factors": ("#2166ac", "^"),
}
LEVELS: Final[dict[Level, str]] = {
    "within_step": "across layers",
    "units": "across a matrix's units",
}


def jobs(options: argparse.Namespace) -> list[Job]:
    """DoRA with every Λ on every place; without decay there is only one place."""
    return [
        Job(
            f"{place}-{total:g}-seed{seed}",
            Recipe(
                "DoRA",
                steps=options.steps,
                batch_size=options.batch_size,
                learning_rate=LEARNING_RATES["DoRA"],
                total_decay=total,
                decay_on=place,
            ),
            seed,
            {"decay_on": place, "total": total},
        )
        for place in PLACES
        for total in options.totals
        if total or place == "all"
        for seed in range(options.seeds)
    ]


def conditions(late: pd.DataFrame) -> pd.DataFrame:
    """Coupling of each condition, and its mean signed ΔM at the last checkpoint, relative to m."""
    by = ["role", "decay_on", "total"]
    found = pd.concat(
        [
            dd.coupling(late, by=by, level=level, signed=signed, permutations=0)
            for level in LEVELS
            for signed in (False, True)
        ],
        ignore_index=True,
    )
    last = late[late["step"] == late.groupby("run")["step"].transform("max")]
    relative = last["signed_delta_magnitude"] / last["magnitude_before"]
    change = relative.groupby([last[column] for column in by]).mean().rename("relative_change")
    return found.merge(change.reset_index(), on=by)


def draw(table: pd.DataFrame) -> Figure:
    """R across layers and across units, and the change of magnitude, against Λ by place."""
    totals = sorted(table["total"].unique())
    at = {total: float(place) for place, total in enumerate(totals)}
    table = table[~table["signed"]]
    with drawing.panels(2, 3, height=4.3) as (figure, axes):
        for row, role in enumerate(ROLES):
            for shift, (place, words) in zip((-0.08, 0.0, 0.08), PLACES.items(), strict=True):
                without_or_here = (table["total"] == 0) | (table["decay_on"] == place)
                here = table[(table["role"] == role) & without_or_here].sort_values("total")
                colour, marker = LOOKS[place]
                for panel, level in zip(axes[row], LEVELS, strict=False):
                    chosen = here[here["level"] == level]
                    x = chosen["total"].map(at).to_numpy(float) + shift
                    drawing.with_interval(
                        *(panel, x, chosen, "pearson", "DoRA"),
                        colour=colour, marker=marker, label=words,
                    )  # fmt: skip
                axes[row, 2].plot(  # of the last level: the change is the same at each
                    x, 100 * chosen["relative_change"], f"{marker}-", color=colour, markersize=4
                )
            for panel, words in zip(axes[row], LEVELS.values(), strict=False):
                panel.set_ylim(-1.05, 1.05)
                panel.set_title(f"{role}: {words}")
            axes[row, 0].set_ylabel("r of ΔM and ΔD")
            axes[row, 2].set_title(f"{role}: mean signed ΔM")
            axes[row, 2].set_ylabel("(m′ − m)/m, %")
            for panel in axes[row]:
                drawing.zero_line(panel)
                panel.set_xticks(list(at.values()), [f"{100 * total:g}%" for total in totals])
        for panel in axes[-1]:
            panel.set_xlabel("total weight decay Λ")
        drawing.legend_below(figure, axes[0, 0])
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every condition, writes table and figure, prints the coupling."""
    parser = argparse.ArgumentParser(prog="python -m analyses.decay_placement")
    sweep.add_options(parser, "decay_placement", steps=60, batch_size=32, seeds=1)
    parser.add_argument("--totals", type=float, nargs="+", default=list(TOTALS))
    options = parser.parse_args(argv)
    table = conditions(sweep.run_or_read(options, jobs(options)).trajectory())
    write_tables(options.out, options.name, {"": table})
    files = save(draw(table), options.out / "figures" / options.name)
    shown = ["role", "level", "decay_on", "total", "pearson", "relative_change"]
    print(table[shown].round(3).to_string(index=False))
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
