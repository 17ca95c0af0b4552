"""Run: `python -m analyses.sign_map` (full setting: `--seeds 3 --steps 300 --batch-size 128`).

When to expect which sign: the coupling of ΔM and ΔD across layers for every learning rate, rank,
batch size and optimizer, with the paper's total weight decay and with none, and, of the middle
setting, for late, evenly spaced and early checkpoints, and pooled over checkpoints: the paper's
late ones, and a whole run. Without decay AdamW and Adam are one optimizer, and share their runs.

Writes figures/sign_map.{png,svg} and analyses/results/sign_map.{csv,json}.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._results import write_tables
from analyses.finetuning import sweep
from analyses.finetuning.recipe import LEARNING_RATES, METHODS, PAPER_TOTAL_DECAY, Recipe
from analyses.finetuning.sweep import Job
from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from dora_dynamics.statistics import CheckpointKind

MIDDLE: Final = "middle"
COUPLED: Final = "Adam, decay in the gradient"
SGD: Final = "SGD with momentum"
POOLED: Final = {"late": "pooled, late checkpoints", "all": "pooled, the whole run"}
DECAYS: Final = ("paper's decay", "no decay")
BY: Final = ["setting", "decay", "role", "method"]
KINDS: Final[tuple[CheckpointKind, ...]] = ("late", "even", "early")
SGD_RATE: Final = 300.0
"""SGD's learning rate over that of Adam's, which makes it turn the weights about as far."""


def settings(recipe: Recipe) -> dict[str, Recipe]:
    """What is varied, one thing at a time, by the name that the figure gives it."""
    rate = recipe.learning_rate
    varied: dict[str, dict[str, Any]] = {MIDDLE: {}}
    varied |= {f"learning rate × {x:g}": {"learning_rate": x * rate} for x in (0.1, 0.3, 3)}
    varied |= {f"batch size × {x:g}": {"batch_size": int(x * recipe.batch_size)} for x in (0.25, 4)}
    if recipe.method != "FT":
        varied |= {f"rank {rank}": {"rank": rank} for rank in (4, 64)}
    varied[COUPLED] = {"optimizer": "adam_l2"}
    varied[SGD] = {"optimizer": "sgd", "learning_rate": SGD_RATE * rate}
    return {name: replace(recipe, **change) for name, change in varied.items()}


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every setting of every method, with the paper's decay and without."""
    found = []
    for method in METHODS:
        middle = Recipe(
            method,
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=LEARNING_RATES[method],
        )
        for decay, total in zip(DECAYS, (PAPER_TOTAL_DECAY[method], 0.0), strict=True):
            for number, (name, recipe) in enumerate(settings(middle).items()):
                if not total and recipe.optimizer == "adam_l2":
                    continue
                found += [
                    Job(
                        f"{method}-{'with' if total else 'without'}-{number}-seed{seed}",
                        replace(recipe, total_decay=total),
                        seed,
                        {"setting": name, "decay": decay},
                    )
                    for seed in range(options.seeds)
                ]
    return found


def couplings(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Coupling across layers in each setting; of the middle one also by choice of checkpoints."""
    tables = []
    for kind in KINDS:
        chosen = dd.select_checkpoints(trajectory, 4, kind)
        if kind != "late":
            chosen = chosen[chosen["setting"] == MIDDLE].assign(setting=f"{kind} checkpoints")
        tables.append(dd.coupling(chosen, by=BY, level="within_step", permutations=0))
    middle = trajectory[trajectory["setting"] == MIDDLE]
    for which, setting in POOLED.items():
        chosen = dd.select_checkpoints(middle, 4, "late") if which == "late" else middle
        chosen = chosen.assign(setting=setting)
        tables.append(dd.coupling(chosen, by=BY, level="pooled", permutations=0))
    first = tables[0]
    same = first[(first["setting"] == MIDDLE) & (first["decay"] == DECAYS[1])]
    return pd.concat([*tables, same.assign(setting=COUPLED)], ignore_index=True)


def draw(table: pd.DataFrame, note: str) -> Figure:
    """A map: a row a setting, a column a role, method and decay, r as colour and number."""
    rows = list(dict.fromkeys(table["setting"]))
    with drawing.panels(1, 2, height=0.2 * len(rows) + 1.7, sharey=True) as (figure, axes):
        image = None
        for panel, role in zip(axes[0], ("query", "value"), strict=True):
            columns = [(method, decay) for method in METHODS for decay in DECAYS]
            grid = np.full((len(rows), len(columns)), np.nan)
            for entry in table[table["role"] == role].itertuples():
                at = rows.index(str(entry.setting)), columns.index((entry.method, entry.decay))  # type: ignore[arg-type]
                grid[at] = r = float(entry.pearson)  # type: ignore[arg-type]
                if np.isnan(r):
                    continue
                sure = float(entry.pearson_low) * float(entry.pearson_high) > 0  # type: ignore[arg-type]
                panel.text(
                    at[1], at[0], f"{r:+.2f}".replace("-", "−"), ha="center", va="center",
                    fontsize=6.5 if sure else 5.5, weight="bold" if sure else "normal",
                    color="white" if abs(r) > 0.6 else "black",
                )  # fmt: skip
            image = panel.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
            panel.grid(visible=False)
            panel.set_facecolor("#EEEEEE")
            panel.set_title(role)
            for row, column in np.argwhere(np.isnan(grid)):
                panel.text(column, row, "–", ha="center", va="center", color="#777777")
            short = {DECAYS[0]: "decay", DECAYS[1]: "none"}
            panel.set_xticks(
                range(len(columns)), [f"{method}\n{short[decay]}" for method, decay in columns]
            )
            panel.set_yticks(range(len(rows)), rows)
            panel.tick_params(length=0)
        assert image is not None
        bar = figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8, pad=0.01)
        bar.set_label("r of ΔM and ΔD")
        figure.supxlabel(note, fontsize=6.5)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every setting, writes the table and the map."""
    parser = argparse.ArgumentParser(prog="python -m analyses.sign_map")
    sweep.add_options(parser, "sign_map", steps=60, batch_size=16, seeds=1)
    options = parser.parse_args(argv)
    done = sweep.run_or_read(options, jobs(options))
    table = couplings(done.trajectory(count=None))
    scores = done.scores.groupby(["setting", "decay", "method"])["retrieval"].mean().reset_index()
    table = table.merge(scores, how="left", on=["setting", "decay", "method"])
    write_tables(options.out, options.name, {"": table})
    recipe, seeds = done.about["recipes"][0], done.scores["seed"].nunique()
    note = (
        f"Middle: AdamW, rank 16, batch {recipe['batch_size']}, {recipe['steps']} steps, the "
        f"paper's learning rates; each other row changes one thing. {seeds} seeds.\n"
        "decay: the paper's total Λ, "
        + ", ".join(f"{method} {total:g}" for method, total in PAPER_TOTAL_DECAY.items())
        + ".\nAcross layers, but where “pooled”. Bold: the 95% interval leaves out zero. "
        "–: no such run.\nWithout decay Adam is AdamW: its row repeats the middle one."
    )
    files = save(draw(table, note), options.out / "figures" / options.name)
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
