"""Run: `python -m analyses.reproduce` (what `make reproduce` runs; about 4 minutes on 2 cores).

Fine-tunes a pre-trained model (all-MiniLM-L6-v2, or any encoder, decoder or encoder–decoder by
`--model`) on the docstrings of the installed Python packages (or on pairs of texts by `--data`)
three ways, follows the query and value projections, and holds what comes out against the DoRA
paper: Figure 2's layout for both, and one table of the coupling of ΔM and ΔD.

Writes figures/reproduction.{png,svg}, analyses/results/reproduction.{csv,json} (of a model with two
stacks also reproduction_stacks.csv) and run directories below runs/reproduction/.
`--weight-decay 0` shows what is left without weight decay.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Final, get_args

import numpy as np
import pandas as pd

import dora_dynamics as dd
from analyses._results import write_tables
from analyses.finetuning import sweep
from analyses.finetuning.recipe import LEARNING_RATES, METHODS, PAPER_TOTAL_DECAY, Recipe
from analyses.finetuning.sweep import Job
from dora_dynamics.commands import printing
from dora_dynamics.commands.coupling import legend
from dora_dynamics.paper import published_points
from dora_dynamics.plotting import magnitude_direction, save
from dora_dynamics.statistics import Level

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVELS: Final[tuple[Level, ...]] = get_args(Level)
_STEPS: Final = 160
CLAIMED: Final = {"FT": -1, "LoRA": 1, "DoRA": -1}
"""The sign of r in the paper's claim."""


def recipes(options: argparse.Namespace) -> list[Recipe]:
    """One recipe a method, with the weight decay that was asked for."""
    chosen = []
    for method in options.methods:
        recipe = Recipe(
            method,
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=LEARNING_RATES[method],
            rank=options.rank,
            roles=tuple(options.roles),
        )
        if options.weight_decay is not None:
            total = options.weight_decay * recipe.total_learning_rate
        elif options.total_decay is not None:
            total = options.total_decay
        else:
            total = PAPER_TOTAL_DECAY[method]
        chosen.append(replace(recipe, total_decay=total))
    return chosen


def coupling_table(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Coupling at every level over four late checkpoints, the paper's pooled r beside it."""
    levels = [
        dd.coupling(trajectory, by=["method", "role"], level=level, signed=signed)
        for signed in (False, True)
        for level in LEVELS
    ]
    table = pd.concat(levels, ignore_index=True)
    paper = dd.coupling(published_points(), by=["method", "role"], level="pooled", permutations=0)
    published = paper[["method", "role", "level", "pearson"]].rename(columns={"pearson": "paper"})
    table = table.merge(published, how="left", on=["method", "role", "level"])
    table.loc[table["signed"], "paper"] = float("nan")
    return table.sort_values(["signed", "role"], kind="stable", ignore_index=True)


def stack_table(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Coupling at every level inside each stack, of a model that has several: else no rows.

    Where a task trains one stack more than the other, r over both is that of two clouds.
    """
    if trajectory["stack"].nunique() < 2:
        return pd.DataFrame()
    by = ["stack", "method", "role"]
    levels = [dd.coupling(trajectory, by=by, level=level, permutations=0) for level in LEVELS]
    last = trajectory[trajectory["step"] == trajectory.groupby("run")["step"].transform("max")]
    turned = last.groupby(by)["delta_direction"].median().rename("median_delta_direction")
    return pd.concat(levels, ignore_index=True).merge(turned.reset_index(), on=by)


def in_words(table: pd.DataFrame) -> str:
    """The rows of absolute ΔM as text: r with its interval, slope, n, and the paper's r."""
    shown = table[~table["signed"]].copy()
    for name in ("pearson", "spearman"):
        ends = shown[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)
        shown[name] = [printing.interval(*estimate) for estimate in ends]
    shown["slope"] = [printing.number(slope, "+.3g") for slope in shown["slope"]]
    shown["paper"] = [printing.number(r) for r in shown["paper"]]
    columns = ["role", "method", "level", "pearson", "spearman", "slope", "n", "paper"]
    return shown[columns].rename(columns={"pearson": "r", "spearman": "ρ"}).to_string(index=False)


def verdict_table(table: pd.DataFrame, level: Level = "within_step") -> pd.DataFrame:
    """For each sign of the paper's claim, whether it is found: it holds, does not, is undecided."""
    found = table[(table["level"] == level) & ~table["signed"].astype(bool)].copy()
    sign = found["method"].map(CLAIMED)
    ends = found[["pearson_low", "pearson_high"]].mul(sign, axis=0)
    found["claimed"] = sign
    found["verdict"] = np.select(
        [ends.min(axis=1) > 0, ends.max(axis=1) < 0], ["holds", "does not hold"], "undecided"
    )
    return found


def verdicts(table: pd.DataFrame) -> list[str]:
    """The verdicts across layers in words."""
    return [
        f"{row['role']}, {row['method']}: {'negative' if row['claimed'] < 0 else 'positive'} "
        f"across layers, as in the paper: {row['verdict']}."
        for row in verdict_table(table).to_dict("records")
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analyses.reproduce",
        description="Fine-tune a pre-trained model as FT, LoRA and DoRA; measure ΔM and ΔD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sweep.add_options(parser, "reproduction", steps=_STEPS, batch_size=32, seeds=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--roles", nargs="+", default=["query", "value"])
    parser.add_argument("--rank", type=int, default=16)
    decay = parser.add_mutually_exclusive_group()
    decay.add_argument(
        "--total-decay",
        type=float,
        help="Λ = Σ lr·weight_decay for every method; default: that of the paper's own recipes, "
        + ", ".join(f"{method} {total}" for method, total in PAPER_TOTAL_DECAY.items()),
    )
    decay.add_argument("--weight-decay", type=float, help="AdamW's coefficient instead; 0 for none")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes, measures, writes the figure and the table, prints what came out."""
    options = parse(argv)
    chosen = recipes(options)
    if not options.redraw:
        for recipe in chosen:
            print(
                f"{recipe.method}: {recipe.steps} steps, learning rate {recipe.learning_rate:g}, "
                f"total decay Λ = {recipe.total_decay:.3g} "
                f"(AdamW weight_decay {recipe.weight_decay:.3g})"
            )
    jobs = [
        Job(f"{recipe.method}-seed{seed}", recipe, seed)
        for seed in range(options.seeds)
        for recipe in chosen
    ]
    done = sweep.run_or_read(options, jobs)
    late = done.trajectory(count=4)
    table = coupling_table(late)
    write_tables(options.out, options.name, {"": table}, digits=6)
    stacks = stack_table(late)
    if len(stacks):
        write_tables(options.out, options.name, {"_stacks": stacks}, digits=6)
    by_role = late.sort_values("role", kind="stable")
    files = save(magnitude_direction(by_role), options.out / "figures" / options.name)

    means = done.scores.groupby("method", sort=False)[["retrieval", "label", "loss"]].mean()
    before = pd.DataFrame({"before": done.about.get("before", {})}).T
    scores = pd.concat([before, means.astype(float)])
    print(f"\nHeld-out score, mean over seeds\n{scores.round(3).to_string()}")
    print("retrieval: share of queries whose own text ranks first; label: share put in its class.")
    print(f"\nCoupling of ΔM and ΔD over four late checkpoints\n{in_words(table)}")
    print(f"{legend(LEVELS)}\npaper: pooled r of the paper's own points.\n")
    for stack, rows in stacks.groupby("stack") if len(stacks) else ():
        print(f"{stack} alone: {'; '.join(verdicts(rows))}")
    print("\n".join(verdicts(table)))
    if options.steps < _STEPS:
        print(
            f"{options.steps} steps are too few to show the finding (default: {_STEPS}): what "
            "holds here may be the work of weight decay alone, the total of which is that of a "
            "whole run."
        )
    written = [*files, sweep.results(options), sweep.results(options, ".csv")]
    print(f"\nWrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
