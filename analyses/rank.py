"""Run: `python -m analyses.rank` (full setting: `--seeds 5 --steps 400 --batch-size 128`).

Task score and coupling against rank, 2 to 128, for LoRA and DoRA, beside full fine-tuning; DoRA
against LoRA of its rank and of twice its rank; and how many directions the updates really use: the
effective rank exp(H) of ΔW, where H is the entropy of its singular values as shares of their sum
(Roy and Vetterli 2007), and the share of ‖ΔW‖² in the largest of them. The same without weight
decay is `--no-decay --name rank_no_decay`.

Writes figures/rank.{png,svg} and analyses/results/rank.{csv,json}, rank_spectrum.csv and
rank_halved.csv.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._mean_interval import mean_interval
from analyses._results import write_tables
from analyses.finetuning import sweep
from analyses.finetuning.recipe import LEARNING_RATES, PAPER_TOTAL_DECAY, Recipe
from analyses.finetuning.sweep import Job
from dora_dynamics.diagnosis.effective_rank import change_of
from dora_dynamics.plotting import save
from dora_dynamics.runs.snapshots import load_baseline, load_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from analyses.finetuning.sweep import Sweep

RANKS: Final = (2, 4, 8, 16, 32, 64, 128)
TABLE_15: Final = {"rank": (4, 8, 16, 32, 64), "LoRA": (39.5, 40.7, 70.9, 74.8, 65.8),
                   "DoRA": (61.9, 77.9, 77.5, 78.1, 72.1)}  # fmt: skip
"""The paper's Table 15: LLaMA-7B, mean accuracy of commonsense reasoning, against rank."""


def jobs(options: argparse.Namespace) -> list[Job]:
    """LoRA and DoRA of every rank, and full fine-tuning; the last weights are kept."""
    found = []
    last = {"every": [options.steps * part // 8 for part in (5, 6, 7, 8)], "keep": "weights"}
    for method in ("FT", "LoRA", "DoRA"):
        for rank in [0] if method == "FT" else options.ranks:
            recipe = Recipe(
                method,
                steps=options.steps,
                batch_size=options.batch_size,
                learning_rate=LEARNING_RATES[method],
                rank=rank,
                total_decay=PAPER_TOTAL_DECAY[method] if options.decay else 0.0,
            )
            found += [
                Job(f"{method}-{rank}-seed{seed}", recipe, seed, {"rank": rank}, recording=last)
                for seed in range(options.seeds)
            ]
    return found


def spectrum(run: Path) -> pd.DataFrame:
    """A row a site: what the singular values of the last W' − W_0 say."""
    last = int(dd.load_runs(run)["step"].max())
    weights = load_weights(run, last)
    rows = []
    for site, before in load_baseline(run).items():
        values = torch.linalg.svdvals(change_of(site, before, weights[site.tensor])).numpy()
        row = {"site": site.name, "role": site.role, "layer": site.layer}
        rows.append(row | shape_of(values))
    return pd.DataFrame(rows)


def spectra(done: Sweep, stored: Path | None) -> pd.DataFrame:
    """The spectra of all runs; a table that is stored already is read, weights are large."""
    if stored is not None and stored.exists():
        return pd.read_csv(stored)
    return pd.concat(
        [
            spectrum(done.folder / job["job"]).assign(
                method=job["method"], rank=job["rank"], seed=job["seed"]
            )
            for job in done.finished
        ],
        ignore_index=True,
    )


def shape_of(values: NDArray[np.float64]) -> dict[str, float]:
    """Entropy, effective rank and largest share of singular values."""
    shares = values[values > 0] / values.sum()
    entropy = float(-(shares * np.log(shares)).sum())
    return {
        "entropy": entropy,
        "effective_rank": float(np.exp(entropy)),
        "top_share": float(values[0] ** 2 / (values**2).sum()),
    }


def halved(scores: pd.DataFrame) -> pd.DataFrame:
    """Score of DoRA minus that of LoRA at the same and at twice its rank, paired by seed.

    At each rank, and as a mean over the ranks: the intervals of single ranks are many, and of few
    seeds whose scores are shares of a thousand texts.
    """
    each: Any = scores.set_index(["method", "rank", "seed"])["retrieval"].sort_index()
    rows = []
    for times in (1, 2):
        differences = {
            rank: each["DoRA", rank] - each["LoRA", times * rank]
            for rank in sorted(set(scores["rank"]) - {0})
            if ("LoRA", times * rank) in each.index.droplevel("seed")
        }
        places = [
            (f"all ranks × {times}", None, pd.DataFrame(differences).mean(axis=1)),
            *(("one rank", rank, difference) for rank, difference in differences.items()),
        ]
        for scope, rank, difference in places if differences else ():
            mean, low, high = mean_interval(difference)
            row = {"scope": scope, "dora_rank": rank, "lora_rank": rank and times * rank}
            row |= {"seeds": len(difference), "difference": mean, "low": low, "high": high}
            rows.append(row)
    return pd.DataFrame(rows).astype({"dora_rank": "Int64", "lora_rank": "Int64"})


def summary(late: pd.DataFrame, scores: pd.DataFrame, shapes: pd.DataFrame) -> pd.DataFrame:
    """A row a method, rank and role: coupling across layers, score and effective rank."""
    coupled = dd.coupling(late, by=["method", "rank", "role"], level="within_step", permutations=0)
    by = ["method", "rank"]
    held = pd.DataFrame(
        [(*key, *mean_interval(group.dropna())) for key, group in scores.groupby(by)["retrieval"]],
        columns=[*by, "score", "score_low", "score_high"],
    )
    used = shapes.groupby([*by, "role"])[["effective_rank", "entropy", "top_share"]].mean()
    return coupled.merge(held, on=by).merge(used.reset_index(), on=[*by, "role"])


def draw(table: pd.DataFrame) -> Figure:
    """Score, Table 15's shape, coupling and effective rank, each against rank."""
    with drawing.panels(2, 2) as (figure, axes):
        score, paper, coupled, used = axes.flat
        value = table[table["role"] == "value"].sort_values("rank")
        for method in ("LoRA", "DoRA"):
            rows = value[value["method"] == method]
            x = rows["rank"].to_numpy(float)
            shift = 0.97 if method == "LoRA" else 1.03
            drawing.with_interval(score, x * shift, rows, "score", method)
            drawing.with_interval(coupled, x * shift, rows, "pearson", method)
            colour, marker = drawing.METHOD_COLOURS[method], drawing.METHOD_MARKERS[method]
            used.plot(x, rows["effective_rank"], marker + "-", color=colour, markersize=4)
            paper.plot(TABLE_15["rank"], TABLE_15[method], marker + "-", color=colour, markersize=4)
            if method == "DoRA":  # of half the rank: below the LoRA it is to be held against
                half: dict[str, Any] = {"color": colour, "markersize": 3.5, "fillstyle": "none"}
                score.plot(2 * x[:-1], rows["score"].iloc[:-1], marker + ":",
                           label="DoRA of half the rank", **half)  # fmt: skip
                paper.plot(2 * np.array(TABLE_15["rank"][:-1]), TABLE_15[method][:-1],
                           marker + ":", **half)  # fmt: skip
        full = value[value["method"] == "FT"].iloc[0]
        for panel, name in ((score, "score"), (coupled, "pearson"), (used, "effective_rank")):
            panel.axhline(
                full[name], color=drawing.METHOD_COLOURS["FT"], linestyle="--", label="FT"
            )
            if name != "effective_rank":
                low, high = full[f"{name}_low"], full[f"{name}_high"]
                panel.axhspan(low, high, color=drawing.METHOD_COLOURS["FT"], alpha=0.1)
        used.plot(RANKS, RANKS, color="#333333", linewidth=0.8, linestyle=":")
        used.annotate("LoRA could use: its rank", (RANKS[3], RANKS[3]), (-4, 3), fontsize=6.5,
                      ha="right", textcoords="offset points")  # fmt: skip
        for panel, title, name in (
            (score, "here: MiniLM, docstrings", "share of texts found"),
            (paper, "the paper's Table 15: LLaMA-7B", "commonsense accuracy, %"),
            (coupled, "coupling, value", "r of ΔM and ΔD across layers"),
            (used, "directions used, value", "effective rank of ΔW"),
        ):
            panel.set_xscale("log", base=2)
            panel.set_xticks(RANKS, [str(rank) for rank in RANKS])
            panel.set_xlim(RANKS[0] / 1.3, RANKS[-1] * 1.3)
            panel.set_title(title)
            panel.set_ylabel(name)
            panel.set_xlabel("rank")
        used.set_yscale("log", base=2)
        ticks = (1, 4, 16, 64, 256)
        used.set_yticks(ticks, [str(tick) for tick in ticks])
        used.minorticks_off()
        coupled.set_ylim(-1.05, 1.05)
        drawing.zero_line(coupled)
        drawing.legend_below(figure, score)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every rank, writes tables and figure."""
    parser = argparse.ArgumentParser(prog="python -m analyses.rank")
    sweep.add_options(parser, "rank", steps=60, batch_size=32, seeds=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--no-decay", dest="decay", action="store_false", help="Λ = 0, not paper's")
    options = parser.parse_args(argv)
    done = sweep.run_or_read(options, jobs(options))
    shapes = spectra(done, sweep.results(options, "_spectrum.csv") if options.redraw else None)
    table, pairs = summary(done.trajectory(), done.scores, shapes), halved(done.scores)
    tables = {"": table, "_spectrum": shapes, "_halved": pairs}
    write_tables(options.out, options.name, tables)
    files = save(draw(table), options.out / "figures" / options.name)
    print(pairs.round(3).to_string(index=False))
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
