"""Run: `python -m analyses.weight_decay` (full setting: `--seeds 5 --steps 500 --batch-size 128`).

An intervention on what sets the sign of the coupling: fine-tune with every total weight decay
Λ = Σ lr·weight_decay from none to 10% on all that the paper's code decays, everything else fixed
(`analyses.decay_placement` tells which part of DoRA it has to act on). Holds the signed change of
magnitude against what decay and turning alone would give, m' = m·exp(−Λ)/(1 − ΔD).

Writes figures/weight_decay.{png,svg}, and analyses/results/weight_decay.csv (the coupling of each
condition), _prediction.csv (its points against the prediction), _contrast.csv (LoRA minus DoRA and
FT), _relative.csv (the coupling of ΔM/m, which tells decay from the size of the weights) and .json.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._mean_interval import mean_interval
from analyses._results import write_tables
from analyses.finetuning import sweep
from analyses.finetuning.recipe import LEARNING_RATES, METHODS, Recipe
from analyses.finetuning.sweep import Job
from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dora_dynamics.statistics import Level

TOTALS: Final = (0.0, 0.003, 0.01, 0.03, 0.1)
ROLES: Final = ("query", "value")
WHAT: Final = {
    "FT": "FT: all of W decays",
    "LoRA": "LoRA: A and B decay, W₀ does not",
    "DoRA": "DoRA: m, A and B decay",
}
SHIFTS: Final = {"FT": -0.08, "LoRA": 0.0, "DoRA": 0.08}


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every method with every Λ."""
    return [
        Job(
            f"{method}-all-{total:g}-seed{seed}",
            Recipe(
                method,
                steps=options.steps,
                batch_size=options.batch_size,
                learning_rate=LEARNING_RATES[method],
                total_decay=total,
            ),
            seed,
            {"total": total},
        )
        for method in METHODS
        for total in options.totals
        for seed in range(options.seeds)
    ]


def couplings(late: pd.DataFrame) -> pd.DataFrame:
    """Coupling across layers and across units in every condition, of absolute and signed ΔM."""
    by = ["role", "method", "total"]
    levels: tuple[Level, ...] = ("within_step", "units")
    return pd.concat(
        [
            dd.coupling(late, by=by, level=level, signed=signed, permutations=0)
            for level in levels
            for signed in (False, True)
        ],
        ignore_index=True,
    )


def prediction(late: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint's relative signed ΔM, measured, and from Λ and ΔD alone."""
    last = late[late["step"] == late.groupby("run")["step"].transform("max")]
    found = last[["method", "total", "seed", "role", "site", "layer"]].copy()
    found["measured"] = last["signed_delta_magnitude"] / last["magnitude_before"]
    shrunk = np.exp(-last["total_decay"].to_numpy(float))
    found["predicted"] = shrunk / (1 - last["delta_direction"].to_numpy(float)) - 1
    found["error"] = found["measured"] - found["predicted"]
    return found


def relative(late: pd.DataFrame) -> pd.DataFrame:
    """Coupling of ΔM/m_0 and ΔD across layers, and r of ΔD and m_0 at the last checkpoint.

    Decay takes the same share of every weight, and large weights turn less: ΔM falls with ΔD by the
    sizes of the weights alone. ΔM/m_0 is free of that.
    """
    by = ["role", "method", "total"]
    shares = late.assign(delta_magnitude=late["relative_delta_magnitude"])
    found = dd.coupling(shares, by=by, level="within_step", permutations=0)
    last = late[late["step"] == late.groupby("run")["step"].transform("max")]
    sizes = [
        (*key, group["delta_direction"].corr(group["magnitude_before"]))
        for key, group in last.groupby(by)
    ]
    return found.merge(pd.DataFrame(sizes, columns=[*by, "r_direction_size"]), on=by)


def contrast(late: pd.DataFrame) -> pd.DataFrame:
    """Coupling across layers of LoRA minus that of another method, paired by seed, at each Λ.

    The intervals are Student's t over seeds, so that they speak of these layers and of other runs.
    """
    by = ["role", "total", "seed", "method"]
    each = dd.coupling(late, by=by, level="within_step", permutations=0, resamples=1)
    wide = each.pivot(index=by[:-1], columns="method", values="pearson")
    rows = []
    for (role, total), group in wide.groupby(level=["role", "total"]):
        for other in ("FT", "DoRA"):
            mean, low, high = mean_interval(group["LoRA"] - group[other])
            row = {"role": role, "total": total, "contrast": f"LoRA − {other}"}
            rows.append(row | {"seeds": len(group), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, points: pd.DataFrame, differences: pd.DataFrame, note: str) -> Figure:
    """R across layers and across units, and signed ΔM with its prediction, each against Λ."""
    absolute = table[~table["signed"]]
    totals = sorted(absolute["total"].unique())
    at = {total: float(place) for place, total in enumerate(totals)}
    levels = {"within_step": "across layers", "units": "across a matrix's units"}
    with drawing.panels(2, 3, height=5.6) as (figure, axes):
        for row, role in enumerate(ROLES):
            for panel, (level, words) in zip(axes[row], levels.items(), strict=False):
                drawing.zero_line(panel)
                shown = absolute[(absolute["level"] == level) & (absolute["role"] == role)]
                for method, shift in SHIFTS.items():
                    chosen = shown[shown["method"] == method].sort_values("total")
                    x = chosen["total"].map(at).to_numpy(float) + shift
                    drawing.with_interval(panel, x, chosen, "pearson", method, label=WHAT[method])
                panel.set_ylim(-1.05, 1.05)
                panel.set_title(f"{role}: {words}", pad=13)
            if 0 in totals:
                _below_title(axes[row, 0], _without_decay(differences, role))
            _below_title(axes[row, 2], _error(points, role))
            _with_prediction(axes[row, 2], points[points["role"] == role], at)
            axes[row, 0].set_ylabel("r of ΔM and ΔD\n← opposed · together →")
            axes[row, 2].set_title(f"{role}: change of magnitude", pad=13)
            axes[row, 2].set_ylabel("(m′ − m)/m, %")
        for panel in axes.flat:
            panel.set_xticks(list(at.values()), [f"{100 * total:g}%" for total in totals])
        for panel in axes[-1]:
            panel.set_xlabel("total weight decay Λ")
        axes[0, 2].plot([], [], "_", color="black", label="predicted: (1 − ΔD)⁻¹ exp(−Λ) − 1")
        figure.suptitle(
            "Inside the matrices (middle) weight decay turns the coupling of magnitude and\n"
            "direction negative where it reaches the magnitude: in FT and DoRA, not in LoRA"
        )
        handles, labels = axes[0, 0].get_legend_handles_labels()
        more = axes[0, 2].get_legend_handles_labels()
        figure.legend(
            handles + more[0], labels + more[1], loc="outside lower center", ncols=4,
            title=note, title_fontsize=6.5,
        )  # fmt: skip
    return figure


def _without_decay(differences: pd.DataFrame, role: str) -> str:
    chosen = differences[(differences["role"] == role) & (differences["total"] == 0)]
    row = chosen[chosen["contrast"] == "LoRA − DoRA"].iloc[0]
    words = f"{row['mean']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]".replace("-", "−")
    return f"without decay, LoRA − DoRA: {words}"


def _below_title(panel: Axes, words: str) -> None:
    panel.annotate(words, (0.5, 1), (0, 3), xycoords="axes fraction", textcoords="offset points",
                   ha="center", fontsize=6)  # fmt: skip


def _error(points: pd.DataFrame, role: str) -> str:
    errors = points[points["role"] == role].groupby("method")["error"]
    return "mean |error|, % of m: " + ", ".join(
        f"{method} {100 * errors.get_group(method).abs().mean():.2f}" for method in METHODS
    )


def _with_prediction(panel: Axes, points: pd.DataFrame, at: dict[float, float]) -> None:
    """Each weight's signed ΔM, mean over seeds, with what was predicted of it."""
    drawing.zero_line(panel)
    shown = points.groupby(["method", "total", "site"], as_index=False)[["measured", "predicted"]]
    for method, rows in shown.mean().groupby("method"):
        x = rows["total"].map(at) + 2.8 * SHIFTS[str(method)]
        panel.plot(
            x, 100 * rows["measured"], drawing.METHOD_MARKERS[str(method)],
            color=drawing.METHOD_COLOURS[str(method)], markersize=3.5, alpha=0.6, markeredgewidth=0,
        )  # fmt: skip
        panel.plot(x, 100 * rows["predicted"], "_", color="black", markersize=5)
    panel.set_yscale("symlog", linthresh=1)
    ticks = [-10, -3, -1, 0, 1, 3]
    panel.set_yticks(ticks, [str(tick).replace("-", "−") for tick in ticks])
    panel.minorticks_off()


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every condition, writes tables and figure, prints the contrast."""
    parser = argparse.ArgumentParser(prog="python -m analyses.weight_decay")
    sweep.add_options(parser, "weight_decay", steps=60, batch_size=32, seeds=1)
    parser.add_argument("--totals", type=float, nargs="+", default=list(TOTALS))
    options = parser.parse_args(argv)
    done = sweep.run_or_read(options, jobs(options))
    late = done.trajectory()
    table, points, differences = couplings(late), prediction(late), contrast(late)
    tables = {"": table, "_prediction": points, "_contrast": differences}
    tables["_relative"] = relative(late)
    write_tables(options.out, options.name, tables)
    recipe, seeds = done.about["recipes"][0], done.scores["seed"].nunique()
    note = (
        f"{done.about['model']}, {recipe['steps']:,} steps of batch {recipe['batch_size']}, "
        f"{seeds} seeds; all but the total decay Λ = Σ lr · weight decay is the same in a "
        "method's runs.\nLines: 95% intervals over layers and seeds. Right: a point is a matrix, "
        "mean over seeds."
    )
    figure = draw(table, points, differences, note)
    files = save(figure, options.out / "figures" / options.name)
    print(differences.round(3).to_string(index=False))
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
