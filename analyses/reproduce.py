"""Run: `python -m analyses.reproduce` (what `make reproduce` runs; about 4 minutes on 2 cores).

Fine-tunes a real pre-trained encoder (all-MiniLM-L6-v2) on the docstrings of the installed Python
packages three ways, follows the query and value projections, and holds what comes out against the
DoRA paper: Figure 2's layout for both, and one table of the coupling of ΔM and ΔD.

Writes figures/reproduction.{png,svg}, analyses/results/reproduction.{csv,json} and run directories
below runs/reproduction/. `--weight-decay 0` shows what is left without weight decay.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import pandas as pd
import torch

import dora_dynamics as dd
from analyses import docstrings, finetuning
from analyses.finetuning import METHODS, PAPER_TOTAL_DECAY, DocstringModel, Recipe, Score, Task
from dora_dynamics import provenance
from dora_dynamics.paper import published_points
from dora_dynamics.plotting import magnitude_direction, save
from dora_dynamics.statistics import Level

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVELS: Final[tuple[Level, ...]] = get_args(Level)
LEARNING_RATES = {"FT": 1e-4, "LoRA": 1e-3, "DoRA": 1e-3}


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


def fine_tune(base: DocstringModel, task: Task, recipe: Recipe, seed: int, folder: Path) -> Score:
    """Train a copy of the base model one way, recorded; returns its held-out score."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    finetuning.adapt(model, recipe)
    recorder = dd.Recorder(
        model,
        recipe.roles,
        every=max(1, recipe.steps // 20),
        run_dir=folder / f"{recipe.method}-seed{seed}",
        seed=seed,
        hyperparameters={"recipe": asdict(recipe)},
        overwrite=True,
    )
    finetuning.train(model, task, recipe, recorder, seed)
    return model.score(task)


def coupling_table(trajectory: pd.DataFrame) -> pd.DataFrame:
    """Coupling at every level over four late checkpoints, the paper's pooled r beside it."""
    late = dd.select_checkpoints(trajectory, count=4, kind="late")
    levels = [
        dd.coupling(late, by=["method", "role"], level=level, signed=signed)
        for signed in (False, True)
        for level in LEVELS
    ]
    table = pd.concat(levels, ignore_index=True)
    paper = dd.coupling(published_points(), by=["method", "role"], level="pooled", permutations=0)
    published = paper[["method", "role", "level", "pearson"]].rename(columns={"pearson": "paper"})
    table = table.merge(published, how="left", on=["method", "role", "level"])
    table.loc[table["signed"], "paper"] = float("nan")
    return table.sort_values(["signed", "role"], kind="stable", ignore_index=True)


def in_words(table: pd.DataFrame) -> str:
    """The rows of absolute ΔM as text: r with its interval, slope, n, and the paper's r."""
    shown = table[~table["signed"]].copy()
    for name in ("pearson", "spearman"):
        shown[name] = [
            f"{r:+.2f} [{low:+.2f}, {high:+.2f}]"
            for r, low, high in zip(
                shown[name], shown[f"{name}_low"], shown[f"{name}_high"], strict=True
            )
        ]
    shown["slope"] = shown["slope"].map("{:+.3g}".format)
    shown["paper"] = shown["paper"].map("{:+.2f}".format).replace("+nan", "")
    columns = ["role", "method", "level", "pearson", "spearman", "slope", "n", "paper"]
    return shown[columns].rename(columns={"pearson": "r", "spearman": "ρ"}).to_string(index=False)


def verdicts(table: pd.DataFrame) -> list[str]:
    """For each sign of the paper's claim, whether it is found across layers: yes, no, undecided."""
    found = table[(table["level"] == "within_step") & ~table["signed"]]
    claimed = {"FT": -1, "LoRA": 1, "DoRA": -1}
    said = []
    for row in found.itertuples():
        sign = claimed[str(row.method)]
        low, high = sorted((sign * float(row.pearson_low), sign * float(row.pearson_high)))  # type: ignore[arg-type]
        verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        word = "negative" if sign < 0 else "positive"
        said.append(f"{row.role}, {row.method}: {word} across layers, as in the paper: {verdict}.")
    return said


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analyses.reproduce",
        description="Fine-tune a pre-trained encoder as FT, LoRA and DoRA; measure ΔM and ΔD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", help="folder or hub name of an encoder; default: packaged MiniLM"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--roles", nargs="+", default=["query", "value"])
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 on")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    decay = parser.add_mutually_exclusive_group()
    decay.add_argument(
        "--total-decay",
        type=float,
        help="Λ = Σ lr·weight_decay for every method; default: that of the paper's own recipes, "
        + ", ".join(f"{method} {total}" for method, total in PAPER_TOTAL_DECAY.items()),
    )
    decay.add_argument("--weight-decay", type=float, help="AdamW's coefficient instead; 0 for none")
    parser.add_argument("--examples", type=int, default=300, help="docstrings of each package")
    parser.add_argument("--held-out", type=int, default=300, help="docstrings kept for the score")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in")
    parser.add_argument("--name", default="reproduction", help="name of the files written")
    parser.add_argument("--redraw", action="store_true", help="use the runs of the last time")
    return parser.parse_args(argv)


def fine_tune_all(options: argparse.Namespace, about: Path) -> None:
    """Train every method with every seed; writes the run directories, and `about` beside them."""
    examples = docstrings.collect(options.examples)
    device = torch.device(options.device)
    encoder, tokenizer = finetuning.load_encoder(
        options.model or finetuning.default_model(), device
    )
    task = Task(tokenizer, examples[options.held_out :], examples[: options.held_out])
    base = DocstringModel(encoder, task).to(device)
    base.fit_head(task)
    scores = {"before": asdict(base.score(task))}
    chosen = recipes(options)
    for recipe in chosen:
        print(
            f"{recipe.method}: {recipe.steps} steps, learning rate {recipe.learning_rate:g}, total "
            f"decay Λ = {recipe.total_decay:.3g} (AdamW weight_decay {recipe.weight_decay:.3g})"
        )
    for seed in range(options.seeds):
        for recipe in chosen:
            score = fine_tune(base, task, recipe, seed, options.out / "runs" / options.name)
            scores[f"{recipe.method}-seed{seed}"] = asdict(score)
    content = {
        "recipes": [asdict(recipe) for recipe in chosen],
        "seeds": options.seeds,
        "model": options.model or "all-MiniLM-L6-v2",
        "scores": scores,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }
    about.parent.mkdir(parents=True, exist_ok=True)
    about.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes, measures, writes the figure and the table, prints what came out."""
    options = parse(argv)
    about = options.out / "analyses" / "results" / f"{options.name}.json"
    if not options.redraw:
        fine_tune_all(options, about)
    scores = pd.DataFrame(json.loads(about.read_text())["scores"]).T
    runs = options.out / "runs" / options.name
    trajectory = dd.load_runs([runs / name for name in scores.index if name != "before"])
    table = coupling_table(trajectory)
    table.to_csv(about.with_suffix(".csv"), index=False, float_format="%.6g")
    late = dd.select_checkpoints(trajectory, count=4, kind="late")
    files = save(magnitude_direction(late), options.out / "figures" / options.name)

    by_method = scores.groupby(scores.index.str.partition("-").get_level_values(0), sort=False)
    print(f"\nHeld-out score, mean over seeds\n{by_method.mean().round(3).to_string()}")
    print(f"\nCoupling of ΔM and ΔD over four late checkpoints\n{in_words(table)}\n")
    print("\n".join(verdicts(table)))
    print(f"\nWrote {', '.join(map(str, [*files, about, about.with_suffix('.csv')]))}")


if __name__ == "__main__":
    main()
