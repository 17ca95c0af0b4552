"""Run: `python -m analyses.paper_figures`.

Redraws Figures 2 and 5 of the DoRA paper from their points, and holds the text against them.

Writes figures/paper_figure_2.{png,svg}, figures/paper_figure_5.{png,svg} and
analyses/results/paper_figures.csv: r of (ΔD, ΔM) over all points with its interval over layers,
slope and number of points; r within each checkpoint; the interval and these again with the labels
that the order of the points suggests (see `dora_dynamics.paper.published_points`); the text's r.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dynamics.paper import FIGURES, published_correlations, published_points
from dora_dynamics.plotting import magnitude_direction, save
from dora_dynamics.statistics import coupling

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

GROUP = ["role", "method"]


def correlations() -> pd.DataFrame:
    """One row per role and method: pooled r, r within each checkpoint, and the text's r."""
    again = estimates(published_points("reordered")).drop(columns=["n", "slope", "pearson"])
    table = estimates(published_points()).join(again.add_suffix("_reordered"))
    table["text"] = published_correlations().set_index(GROUP)["paper"]
    table = table.reset_index()
    table.insert(0, "figure", table["role"].map(FIGURES))
    return table


def estimates(points: pd.DataFrame) -> pd.DataFrame:
    """The coupling of all points of a panel, and beside it of those of each checkpoint."""
    pooled = coupling(points, by=GROUP, level="pooled", permutations=0).set_index(GROUP)
    within = coupling(points, by=[*GROUP, "step"], level="pooled", permutations=0)
    steps = within.pivot(index=GROUP, columns="step", values="pearson").add_prefix("r_step_")
    return pooled[["n", "slope", "pearson", "pearson_low", "pearson_high"]].join(steps)


def findings(table: pd.DataFrame) -> list[str]:
    """Plain sentences on where the text differs from the figures."""
    panels = table.set_index(GROUP)
    r, text = panels["pearson"].round(2), panels["text"]
    ft, lora, dora = (("query", method) for method in ("FT", "LoRA", "DoRA"))
    said = []
    if (r[ft], r[dora]) == (text[dora], text[ft]):
        said.append(
            f"Query: the text gives FT {text[ft]:+.2f} and DoRA {text[dora]:+.2f}, the points give "
            f"FT {r[ft]:+.2f} and DoRA {r[dora]:+.2f}: FT and DoRA are exchanged in the text."
        )
    if text[lora] not in (r[lora], r["value", "LoRA"]):
        said.append(
            f"LoRA: the text's {text[lora]:+.2f} matches neither Figure 2 ({r[lora]:+.2f}) "
            f"nor Figure 5 ({r['value', 'LoRA']:+.2f})."
        )
    if all(r[panel] * text[panel] > 0 for panel in (ft, lora, dora)):
        said.append("The signs, which are the finding, are the same in the text and the figures.")
    for labels, ending in (("as printed", ""), ("reordered", "_reordered")):
        steps = panels[[f"r_step_{step}{ending}" for step in (1, 2, 3, 4)]]
        spread = (steps.max(axis=1) - steps.min(axis=1)).max()
        said.append(f"Labels {labels}: r within a checkpoint varies by up to {spread:.2f}.")
    return said


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the figures, writes the table, prints it and what it says."""
    parser = argparse.ArgumentParser(prog="python -m analyses.paper_figures")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in (default: .)")
    out: Path = parser.parse_args(argv).out

    table = correlations()
    results = out / "analyses" / "results" / "paper_figures.csv"
    results.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(results, index=False, lineterminator="\n")

    points = published_points()
    points["layer"] += 1  # the paper counts layers from 1
    for role, number in FIGURES.items():
        figure = magnitude_direction(points[points["role"] == role], coupling=table)
        save(figure, out / "figures" / f"paper_figure_{number}")

    shown = table.astype({"n": object}).set_index(["figure", *GROUP]).T
    print(shown.to_string(float_format="{:+.2f}".format, na_rep=""), "", sep="\n")
    print(*findings(table), sep="\n")


if __name__ == "__main__":
    main()
