"""Run: `python -m analyses.update_geometry` after `python -m analyses.reproduce` (seconds).

LoRA's line is geometry: an update orthogonal to each w_0 turns the unit by ΔD and lengthens it by
ΔM = m·ΔD/(1 − ΔD), exactly. Draws that curve over the recorded points of each method and over the
paper's own, says how much of their spread it explains, and follows the share of each method's
update that is radial (along w_0) over training. An update in a random direction would have a share
of 1/k, with k inputs.

Reads the run directories below runs/NAME for each `--runs NAME`; writes
figures/update_geometry.{png,svg} and analyses/results/update_geometry.csv, _share.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._results import write_about, write_tables
from analyses.finetuning.recipe import METHODS
from dora_dynamics.paper import published_points
from dora_dynamics.plotting import save
from dora_dynamics.runs.directory import read_info

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

ROLES: Final = ("query", "value")


def load(folders: Sequence[Path]) -> pd.DataFrame:
    """All runs of the folders, each row with the name of its folder as `source`."""
    tables = []
    for folder in folders:
        runs = sorted(file.parent for file in folder.glob("*/run.json"))
        if not runs:
            raise SystemExit(f"{folder} holds no runs: python -m analyses.reproduce first.")
        for run in runs:
            info = read_info(run)
            name = f"{folder.name}/{info.run}"
            tables.append(dd.load_runs(run).assign(source=folder.name, run=name))
    return pd.concat(tables, ignore_index=True)


def lengthening(turned: NDArray[np.float64]) -> NDArray[np.float64]:
    """ΔM/m of an orthogonal update that turns by ΔD: ΔD/(1 − ΔD)."""
    found: NDArray[np.float64] = turned / (1 - turned)
    return found


def explained(rows: pd.DataFrame) -> dict[str, float]:
    """How well the curve, with each weight's own m and nothing fitted, tells ΔM.

    `r_squared` is 1 − Σ(ΔM − curve)²/Σ(ΔM − mean)², below zero where the mean tells more;
    `ratio` the median of ΔM over the curve.
    """
    measured = rows["delta_magnitude"].to_numpy(float)
    curve = rows["magnitude_before"].to_numpy(float) * lengthening(
        rows["delta_direction"].to_numpy(float)
    )
    left = float(((measured - curve) ** 2).sum())
    total = float(((measured - measured.mean()) ** 2).sum())
    return {
        "n": len(rows),
        "r_squared": 1 - left / total,
        "ratio": float(np.median(measured / curve)),
    }


def fitted(points: pd.DataFrame) -> dict[str, float]:
    """The paper's points, whose m is not known: the m that fits best, and what the curve explains.

    `r_squared_line` is that of a straight line with an intercept, which has one number more.
    """
    x = points["delta_direction"].to_numpy(float)
    y = points["delta_magnitude"].to_numpy(float)
    curve = lengthening(x)
    magnitude = float(curve @ y / (curve @ curve))
    total = float(((y - y.mean()) ** 2).sum())
    line = np.polyval(np.polyfit(x, y, 1), x)
    return {
        "n": len(points),
        "magnitude": magnitude,
        "r_squared": 1 - float(((y - magnitude * curve) ** 2).sum()) / total,
        "r_squared_line": 1 - float(((y - line) ** 2).sum()) / total,
    }


def table(late: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A row a source, method and role: what the curve explains."""
    rows = [
        {"source": source, "role": role, "method": method} | explained(group)
        for (source, role, method), group in late.groupby(["source", "role", "method"])
    ]
    rows += [
        {"source": "paper", "role": role, "method": method} | fitted(group)
        for (role, method), group in paper.groupby(["role", "method"])
    ]
    return pd.DataFrame(rows)


def shares(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Radial share of the update over training: mean and range over weights and runs."""
    after = trajectory[trajectory["step"] > 0]
    grouped = after.groupby(["source", "role", "method", "step"])["radial_share"]
    return grouped.agg(["mean", "min", "max"]).reset_index()


def draw(
    late: pd.DataFrame, paper: pd.DataFrame, along: pd.DataFrame, source: str, inputs: int
) -> Figure:
    """Points with the curve ΔM = mΔD/(1 − ΔD), the paper's with theirs; radial share over time."""
    late, along = late[late["source"] == source], along[along["source"] == source]
    with drawing.panels(2, 3) as (figure, axes):
        for row, role in enumerate(ROLES):
            here, theirs, share = axes[row]
            for method in METHODS:
                looks = {"color": drawing.METHOD_COLOURS[method], "alpha": 0.6, "label": method}
                marker = drawing.METHOD_MARKERS[method]
                points = late[(late["role"] == role) & (late["method"] == method)]
                here.plot(
                    points["delta_direction"],
                    points["delta_magnitude"] / points["magnitude_before"],
                    marker, markersize=3, markeredgewidth=0, **looks,
                )  # fmt: skip
                points = paper[(paper["role"] == role) & (paper["method"] == method)]
                theirs.plot(
                    points["delta_direction"], points["delta_magnitude"],
                    marker, markersize=3, markeredgewidth=0, **looks,
                )  # fmt: skip
                walk = along[(along["role"] == role) & (along["method"] == method)]
                share.plot(walk["step"], walk["mean"], color=looks["color"])
                share.fill_between(
                    walk["step"], walk["min"], walk["max"], color=looks["color"], alpha=0.12
                )
            x = np.geomspace(late["delta_direction"].min(), late["delta_direction"].max(), 200)
            here.plot(x, lengthening(x), color="#333333", linewidth=0.9, zorder=1)
            here.set_xscale("log")
            here.set_yscale("log")
            lora = paper[(paper["role"] == role) & (paper["method"] == "LoRA")]
            best = fitted(lora)
            x = np.linspace(0, float(lora["delta_direction"].max()), 100)
            theirs.plot(
                x, best["magnitude"] * lengthening(x), color="#333333", linewidth=0.9, zorder=1
            )
            theirs.annotate(
                f"LoRA: m = {best['magnitude']:.2f}, R² = {best['r_squared']:.2f}",
                (0.97, 0.06), xycoords="axes fraction", fontsize=6.5, ha="right",
            )  # fmt: skip
            share.axhline(1 / inputs, color="#333333", linewidth=0.8, linestyle=":")
            share.annotate(
                "a random direction: 1/k", (0.97, 1 / inputs), (0, -2), ha="right", va="top",
                xycoords=share.get_yaxis_transform(), textcoords="offset points", fontsize=6.5,
            )  # fmt: skip
            share.set_yscale("log")
            share.set_ylim(0.5 / inputs, 1.5)
            r_squared = explained(late[(late["role"] == role) & (late["method"] == "LoRA")])
            here.annotate(f"LoRA: R² = {r_squared['r_squared']:.2f}", (0.97, 0.06), ha="right",
                          xycoords="axes fraction", fontsize=6.5)  # fmt: skip
            here.set_title(f"{role}: recorded here")
            theirs.set_title(f"{role}: the paper's points")
            share.set_title(f"{role}: radial share of ‖ΔW‖²", pad=13)
            share.annotate("the rest is tangential; bands: all weights and seeds", (0.5, 1), (0, 3),
                           xycoords="axes fraction", textcoords="offset points", ha="center",
                           fontsize=6)  # fmt: skip
            here.set_ylabel("ΔM/m")
            theirs.set_ylabel("ΔM")
        for panel, name in zip(axes[1], ("ΔD", "ΔD", "step"), strict=True):
            panel.set_xlabel(name)
        axes[0, 0].plot([], [], "-", color="#333333", linewidth=0.9,
                        label="orthogonal update: ΔM = m ΔD/(1 − ΔD)")  # fmt: skip
        drawing.legend_below(figure, axes[0, 0])
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Reads runs, writes the tables and the figure."""
    parser = argparse.ArgumentParser(prog="python -m analyses.update_geometry")
    parser.add_argument(
        "--runs", nargs="+", default=["reproduction"], help="names below runs/; the first is drawn"
    )
    parser.add_argument("--inputs", type=int, default=384, help="k, inputs of a followed weight")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to read and write in")
    options = parser.parse_args(argv)
    trajectory = load([options.out / "runs" / name for name in options.runs])
    late = pd.concat(
        [dd.select_checkpoints(group, 4, "late") for _, group in trajectory.groupby("source")]
    )
    paper = published_points()
    found, along = table(late, paper), shares(trajectory)
    write_tables(options.out, "update_geometry", {"": found, "_share": along})
    write_about(options.out, "update_geometry", {"runs": options.runs})
    figure = draw(late, paper, along, options.runs[0], options.inputs)
    files = save(figure, options.out / "figures" / "update_geometry")
    print(found.round(3).to_string(index=False))
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
