"""Run: `python -m analyses.adapter_zoo` (full: `--seeds 3 --steps 200 --batch-size 64`).

Every method of PEFT that has an effective weight, put on the query and value projections: same
data, steps and batch size, no weight decay, each at the learning rate (of four) at which it finds
most held-out texts. One map: how ΔM goes with ΔD across the units of a matrix, against the share
of the update that is radial, the task score as colour, full fine-tuning as the landmark. Is a
method that moves more like full fine-tuning also better at the task?

A method's distance from full fine-tuning is Euclidean over its ranks, as shares, in four measures:
coupling across layers and across units (signed), radial share, and log of relative ΔM over ΔD.
Ranks, since a method that turns nothing (IA3) or lengthens nothing (HRA) has a ratio of rounding
errors, which would set the scale of a standardised ratio; that distance (couplings in Fisher's z)
is kept beside it.

Writes figures/adapter_zoo.{png,svg}, analyses/results/adapter_zoo.csv, _answer.csv and .json.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._results import write_tables
from analyses.finetuning import sweep
from analyses.finetuning.recipe import Recipe
from analyses.finetuning.sweep import Job
from dora_dynamics.correlation import spearman
from dora_dynamics.plotting import save
from dora_dynamics.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyses.finetuning.task import PairModel
    from dora_dynamics.statistics import Level

RATES: Final = (3e-4, 1e-3, 3e-3, 1e-2)
FULL_RATES: Final = (3e-5, 1e-4, 3e-4, 1e-3)
MEASURES: Final = ("r_layers", "r_units", "radial_share", "log_ratio")

ZOO: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "LoRA": ("LORA", {"r": 16, "lora_alpha": 16}),
    "rsLoRA": ("LORA", {"r": 16, "lora_alpha": 16, "use_rslora": True}),
    "DoRA": ("LORA", {"r": 16, "lora_alpha": 16, "use_dora": True}),
    "PiSSA": ("LORA", {"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa"}),
    "OLoRA": ("LORA", {"r": 16, "lora_alpha": 16, "init_lora_weights": "olora"}),
    "LoRA orthogonal": ("LORA", {"r": 16, "lora_alpha": 16, "init_lora_weights": "orthogonal"}),
    "AdaLoRA": ("ADALORA", {"init_r": 16, "target_r": 8, "total_step": 10**6}),
    "AdaMSS": ("ADAMSS", {"r": 64, "num_subspaces": 4, "subspace_rank": 2}),
    "BOFT": ("BOFT", {"boft_block_size": 32}),
    "C3A": ("C3A", {"block_size": 32}),
    "DEFT": ("DEFT", {"r": 16}),
    "DeLoRA": ("DELORA", {"r": 16}),
    "FourierFT": ("FOURIERFT", {"n_frequency": 1000}),
    "FRoD": ("FROD", {"progressbar": False}),
    "GLoRA": ("GLORA", {"r": 16}),
    "GraLoRA": ("GRALORA", {"r": 16, "gralora_k": 2}),
    "HiRA": ("HIRA", {"r": 16}),
    "HRA": ("HRA", {"r": 8}),
    "IA3": ("IA3", {"feedforward_modules": []}),
    "LoHa": ("LOHA", {"r": 8}),
    "LoKr": ("LOKR", {"r": 16}),
    "MiSS": ("MISS", {"r": 16}),
    "Bone (MiSS bat)": ("MISS", {"r": 16, "init_weights": "bat"}),
    "OFT": ("OFT", {"oft_block_size": 32, "r": 0}),
    "OSF": ("OSF", {"effective_rank": 192}),
    "PEANUT": ("PEANUT", {"r": 16}),
    "PSOFT": ("PSOFT", {"r": 32}),
    "PVeRA": ("PVERA", {"r": 256}),
    "RandLoRA": ("RANDLORA", {"r": 16}),
    "RoAd": ("ROAD", {"variant": "road_1"}),
    "SHiRA": ("SHIRA", {"r": 16}),
    "SuperTuning": ("SUPERTUNING", {"sparsity": 0.9}),
    "TinyLoRA": ("TINYLORA", {"r": 2, "u": 16}),
    "UniLoRA": ("UNILORA", {"r": 16, "theta_d_length": 4096}),
    "VB-LoRA": ("VBLORA", {"r": 4, "num_vectors": 64, "vector_length": 64}),
    "VeRA": ("VERA", {"r": 256}),
    "WaveFT": ("WAVEFT", {"n_frequency": 1000}),
}
"""PEFT type and settings by the name on the map: the methods that change query and value. Not
here are those that change other weights (LN tuning, trainable tokens, BEFT) or none."""


def adapt_by_peft(model: PairModel, recipe: Recipe) -> None:
    """Put the method on the backbone by PEFT, or train everything for FT."""
    model.requires_grad_(True)
    if recipe.method != "FT":
        import peft

        kind, settings = ZOO[recipe.method]
        config: Any = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
        targets = [site.module for site in find_sites(model.backbone, recipe.roles)]
        model.backbone = peft.get_peft_model(
            model.backbone,
            config(target_modules=targets, **settings),
        )
    model.head.requires_grad_(True)


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every method at every learning rate, and full fine-tuning."""
    return [
        Job(
            f"{number}-{rate:g}-seed{seed}",
            Recipe(method, options.steps, options.batch_size, rate),
            seed,
            {"rate": rate},
            recording={"every": [options.steps * part // 8 for part in (5, 6, 7, 8)]},
            adapt=adapt_by_peft,
            capture=True,
            graph=method == "FT",
            may_fail=method != "FT",
        )
        for number, method in enumerate(["FT", *options.methods])
        for rate in (FULL_RATES if method == "FT" else RATES)
        for seed in range(options.seeds)
    ]


def best_rate(scores: pd.DataFrame) -> pd.DataFrame:
    """A row a method: the learning rate with the best mean score, that score, what is trained."""
    by = ["method", "rate"]
    means = scores.groupby(by, sort=False)[["retrieval", "loss", "trained_parameters"]].mean()
    best = means["retrieval"].groupby(level="method", sort=False).idxmax().dropna()
    return means.loc[list(best)].reset_index()


def measures(late: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """A row a method at its best rate: score and the four measures, and its distance from FT."""
    table = late.merge(chosen[["method", "rate"]], on=["method", "rate"])
    rows = chosen.set_index("method")
    levels: dict[str, Level] = {"r_layers": "within_step", "r_units": "units"}
    for name, level in levels.items():
        found = dd.coupling(
            table,
            by=["method", "role"],
            level=level,
            signed=True,
            permutations=0,
            resamples=1,
        )
        rows[name] = found.groupby("method")["pearson"].mean()
    means = table.groupby("method")
    rows["radial_share"] = means["radial_share"].mean()
    ratio = table["relative_delta_magnitude"] / table["delta_direction"]
    table["log_ratio"] = np.log(ratio.where(ratio > 0))
    rows["log_ratio"] = table.groupby("method")["log_ratio"].mean()
    ranks = rows[list(MEASURES)].rank(pct=True)
    rows["distance"] = _from_full(ranks)
    placed = rows[list(MEASURES)].copy()
    for name in ("r_layers", "r_units"):
        placed[name] = np.arctanh(placed[name].clip(-0.999, 0.999))
    rows["standardised_distance"] = _from_full((placed - placed.mean()) / placed.std())
    return rows.reset_index()


def _from_full(placed: pd.DataFrame) -> pd.Series[float]:
    """Euclidean distance of each method's row from that of full fine-tuning."""
    apart: pd.Series[float] = ((placed - placed.loc["FT"]) ** 2).sum(axis=1, skipna=False)
    return apart**0.5


def answer(table: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Correlation of distance from FT with the score, over methods, with bootstrap intervals."""
    others = table[table["method"] != "FT"].dropna(subset=["distance", "retrieval"])
    rng = np.random.default_rng(seed)
    rows = []
    for name in ("distance", "standardised_distance", *MEASURES):
        x, y = others[name].to_numpy(float), others["retrieval"].to_numpy(float)
        drawn = rng.integers(len(x), size=(resamples, len(x)))
        many = np.array([spearman(x[chosen], y[chosen]) for chosen in drawn])
        many = many[np.isfinite(many)]
        low, high = np.quantile(many, [0.025, 0.975]) if many.size else (np.nan, np.nan)
        rho = spearman(x, y)
        rows.append({"measure": name, "methods": len(x), "rho": rho, "low": low, "high": high})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Left: the map. Right: score against distance from FT. Below: the names of the numbers."""
    shown = table.sort_values("retrieval", ascending=False, ignore_index=True)
    scale = Normalize(float(shown["retrieval"].quantile(0.05)), float(shown["retrieval"].max()))
    with drawing.panels(1, 2, height=5.0, width_ratios=(1.35, 1)) as (figure, axes):
        plane, against = axes[0]
        image = None
        for panel, x, y in (
            (plane, "r_units", "radial_share"),
            (against, "distance", "retrieval"),
        ):
            for kind, rows in shown.groupby(shown["method"] == "FT"):
                image = panel.scatter(
                    rows[x], rows[y], s=130 if kind else 26, marker="*" if kind else "o",
                    c=rows["retrieval"], norm=scale, cmap="viridis", linewidth=0.4,
                    edgecolor="black", zorder=4,
                )  # fmt: skip
        plane.axvline(0, color="#333333", linewidth=0.7)
        plane.set_yscale("log")
        plane.set_xlim(-1.05, 1.05)
        plane.set_xlabel("r of signed ΔM and ΔD across the units of a matrix")
        plane.set_ylabel("radial share of ‖ΔW‖²")
        plane.set_title("how each method moves the weights (★ FT)")
        rho = found.set_index("measure").loc["distance"]
        words = f"ρ = {rho['rho']:+.2f} [{rho['low']:+.2f}, {rho['high']:+.2f}]"
        against.set_title(words.replace("-", "−"))
        against.set_xlabel("distance of ranks from those of FT (★)")
        against.set_ylabel("share of texts found")
        assert image is not None
        figure.colorbar(image, ax=plane, label="share of texts found", pad=0.01, extend="min")
        names = [f"{number} {row}" for number, row in enumerate(shown["method"], start=1)]
        text = [" · ".join(names[at : at + 8]) for at in range(0, len(names), 8)]
        figure.supxlabel("\n".join(text), fontsize=6)
        figure.draw_without_rendering()
        _number(plane, shown["r_units"], shown["radial_share"])
        _number(against, shown["distance"], shown["retrieval"])
    return figure


def _number(panel: Axes, x: pd.Series, y: pd.Series) -> None:
    """A number beside each point, from 1 on, pushed apart where points are crowded."""
    finite = np.isfinite(x.to_numpy(float)) & np.isfinite(y.to_numpy(float))
    points = panel.transData.transform(np.column_stack([x, y])[finite])
    dots = panel.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    middle = points.mean(axis=0)
    away = (points - middle) / np.linalg.norm(points - middle, axis=1, keepdims=True)
    labels = points + 7 * dots * away
    for _ in range(400):
        for others, room in ((labels, 7.0), (points, 5.5)):
            apart = labels[:, None] - others[None]
            length = np.linalg.norm(apart, axis=2) + 1e-9
            push = np.clip(room * dots - length, 0, None)
            if others is labels:
                np.fill_diagonal(push, 0)
            labels = labels + 0.3 * (push[..., None] * apart / length[..., None]).sum(1)
        labels += 0.02 * (points - labels)
    for number, at, point in zip(np.flatnonzero(finite), labels, points, strict=True):
        panel.annotate(
            str(number + 1), (x.iloc[number], y.iloc[number]), tuple((at - point) / dots),
            textcoords="offset points", ha="center", va="center", fontsize=5.5, zorder=5,
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "#777777", "shrinkA": 2,
                        "shrinkB": 1},
        ).set_in_layout(False)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every method, writes the table, the answer and the map."""
    parser = argparse.ArgumentParser(prog="python -m analyses.adapter_zoo")
    sweep.add_options(parser, "adapter_zoo", steps=40, batch_size=16, seeds=1)
    parser.add_argument("--methods", nargs="+", choices=list(ZOO), default=list(ZOO))
    options = parser.parse_args(argv)
    done = sweep.run_or_read(options, jobs(options))
    table = measures(done.trajectory(), best_rate(pd.DataFrame(done.finished)))
    found = answer(table)
    write_tables(options.out, options.name, {"": table, "_answer": found})
    files = save(draw(table, found), options.out / "figures" / options.name)
    for method, error in {j["method"]: j["error"] for j in done.failed}.items():
        print(f"{method} was not measured: {error}")
    print(table.round(3).to_string(index=False))
    print(found.round(3).to_string(index=False))
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
