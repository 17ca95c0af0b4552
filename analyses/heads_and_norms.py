"""Run: `python -m analyses.heads_and_norms` (full: `--seeds 3 --steps 400 --batch-size 128`).

Below and beyond matrices: ΔM and ΔD of every attention head's query and value, and of the weights
of layer norms, over training, for full fine-tuning, LoRA and DoRA. As in the paper's recipe for
DoRA, norms and biases train too. A norm's weight is taken as one unit, a vector with a magnitude
and a direction.

Writes figures/heads_and_norms.{png,svg} and analyses/results/heads_and_norms.{csv,json} and
heads_and_norms_path.csv.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._results import write_tables
from analyses.finetuning import sweep
from analyses.finetuning.recipe import LEARNING_RATES, METHODS, PAPER_TOTAL_DECAY, Recipe
from analyses.finetuning.sweep import Job
from analyses.finetuning.training import adapt
from dora_dynamics.correlation import pearson, slope, spearman
from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from analyses.finetuning.task import PairModel

FOLLOWED: Final = ("query", "value", "norm")
PARTS: Final = ("query heads", "value heads", "norms")
INSIDE: Final = "heads of one layer"
RELATIVE: Final = "heads of one layer, ΔM/m"


def adapt_with_norms(model: PairModel, recipe: Recipe) -> None:
    """The method's own adapters, and every bias and every norm trained beside them."""
    adapt(model, recipe)
    for name, parameter in model.backbone.named_parameters():
        if parameter.ndim == 1 and ("norm" in name.lower() or name.endswith("bias")):
            parameter.requires_grad_(True)


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every method with its own learning rate and the paper's decay, recorded head by head."""
    found = []
    how: dict[str, Any] = {"granularity": "head"}
    for method in METHODS:
        recipe = Recipe(
            method,
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=LEARNING_RATES[method],
            total_decay=PAPER_TOTAL_DECAY[method],
        )
        found += [
            Job(
                f"{method}-seed{seed}",
                recipe,
                seed,
                follow=FOLLOWED,
                recording=how,
                adapt=adapt_with_norms,
            )
            for seed in range(options.seeds)
        ]
    return found


def with_part(trajectory: pd.DataFrame) -> pd.DataFrame:
    """The rows with what they are of: query heads, value heads or norms."""
    heads = trajectory["role"].isin(["query", "value"])
    part = np.where(heads, trajectory["role"] + " heads", "norms")
    return trajectory.assign(part=part)


def couplings(late: pd.DataFrame) -> pd.DataFrame:
    """Across all heads (or norms) at one checkpoint, and across the heads inside each layer.

    Inside layers also of ΔM/m, which the size of a head does not change.
    """
    across = dd.coupling(late, by=["method", "part"], level="within_step", permutations=0)
    heads = late[late["part"] != "norms"]
    shares = heads.assign(delta_magnitude=heads["relative_delta_magnitude"])
    inside = [
        heads_inside(group).assign(
            method=str(method), part=str(part), scope=scope, level="within_step"
        )
        for scope, rows in ((INSIDE, heads), (RELATIVE, shares))
        for (method, part), group in rows.groupby(["method", "part"])
    ]
    across = across.assign(scope="all heads or norms")
    return pd.concat([across, *inside], ignore_index=True)


def heads_inside(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean r across the heads of one layer at one checkpoint, its interval over layers and runs.

    Heads are to a layer what units are to a matrix: a layer has one r a checkpoint, and layers stay
    whole over runs, which start from the same heads.
    """
    by = ["run", "layer", "step"]
    x, y = "delta_direction", "delta_magnitude"
    each = pd.DataFrame(
        [
            dict(zip(by, key, strict=True))
            | {
                "unit_coupling": pearson(group[x], group[y]),
                "unit_rank_coupling": spearman(group[x], group[y]),
                "unit_slope": slope(group[x], group[y]),
                "units": len(group),
            }
            for key, group in rows[rows["step"] > 0].groupby(by)
        ]
    )
    each = each.assign(all=0, site=each["layer"].astype(str))
    found = dd.coupling(each, by="all", level="units", permutations=0)
    return found.drop(columns=["all", "level", "units"])


def path(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Mean relative ΔM and mean ΔD of each part over training, with their spread over rows."""
    grouped = trajectory.groupby(["method", "part", "step"])
    measures = ["relative_delta_magnitude", "delta_direction", "signed_delta_magnitude"]
    table = grouped[measures].agg(["median", "min", "max"])
    table.columns = ["_".join(column) for column in table.columns]
    return table.reset_index()


def draw(late: pd.DataFrame, along: pd.DataFrame) -> Figure:
    """Top: each head or norm at the last checkpoint. Bottom: the median of each over training."""
    last = late[late["step"] == late.groupby("run")["step"].transform("max")]
    with drawing.panels(2, 3) as (figure, axes):
        for column, part in enumerate(PARTS):
            top, bottom = axes[:, column]
            for method in METHODS:
                colour, marker = drawing.METHOD_COLOURS[method], drawing.METHOD_MARKERS[method]
                rows = last[(last["part"] == part) & (last["method"] == method)]
                top.plot(
                    rows["delta_direction"], rows["relative_delta_magnitude"], marker,
                    color=colour, markersize=3, alpha=0.6, markeredgewidth=0, label=method,
                )  # fmt: skip
                walk = along[(along["part"] == part) & (along["method"] == method)]
                walk = walk[walk["step"] > 0]
                x = walk["delta_direction_median"].to_numpy(float)
                y = walk["relative_delta_magnitude_median"].to_numpy(float)
                bottom.plot(x, y, "-", color=colour)
                bottom.plot(x[-1:], y[-1:], marker, color=colour, markersize=4)
            for panel in (top, bottom):
                panel.set_xscale("log")
                panel.set_yscale("log")
            top.set_title(part)
            bottom.set_xlabel("ΔD")
        axes[0, 0].set_ylabel("ΔM/m: each at the end,\nall layers and seeds")
        axes[1, 0].set_ylabel("ΔM/m: median, step by step\n(marker: the end)")
        drawing.legend_below(figure, axes[0, 0])
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every method, writes tables and figure."""
    parser = argparse.ArgumentParser(prog="python -m analyses.heads_and_norms")
    sweep.add_options(parser, "heads_and_norms", steps=60, batch_size=32, seeds=1)
    options = parser.parse_args(argv)
    done = sweep.run_or_read(options, jobs(options))
    trajectory = with_part(done.trajectory(count=None))
    late = dd.select_checkpoints(trajectory, 4, "late")
    table, along = couplings(late), path(trajectory)
    write_tables(options.out, options.name, {"": table, "_path": along})
    files = save(draw(late, along), options.out / "figures" / options.name)
    shown = ["method", "part", "scope", "n", "pearson", "pearson_low", "pearson_high"]
    print(table[shown].round(3).to_string(index=False))
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
