"""Run: `python -m analyses.merge` (a minute on 2 cores; a GPU is used where there is one).

Merging costs nothing and changes nothing: how far the outputs of a merged LoRA or DoRA are from
those of the adapted model, by dtype, after real training steps; and the latency of the adapted and
the merged model over that of the original one, timed in turns. Our adapted module's weight is W'
itself, so that merging can change nothing; PEFT's computes W_0 and the update apart, and its
merged outputs are rounded otherwise.

Writes figures/merge.{png,svg} and analyses/results/merge.{csv,json}.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch

import dora_dynamics as dd
from analyses import _drawing as drawing
from analyses._results import write_about, write_tables
from analyses.adapter_zoo import adapt_by_peft
from analyses.finetuning import starting_point
from analyses.finetuning.recipe import LEARNING_RATES, Recipe
from analyses.finetuning.training import adapt, gradients, make_optimizer, order_of
from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure

    from analyses.finetuning.sweep import Adapt
    from analyses.finetuning.task import PairModel, Task, Tokens

NOTHING: Final = 1e-18
"""Where a difference of zero is drawn on a logarithmic axis."""
DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tuned(base: PairModel, task: Task, recipe: Recipe, adapt: Adapt = adapt) -> PairModel:
    """A copy of the base model after the recipe's steps, its adapters still on."""
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    adapt(model, recipe)
    optimizer = make_optimizer(model, recipe)
    order = order_of(len(task.train), recipe, 0).to(task.train.labels.device)
    backward = gradients(model, task.train, order[0], graph=False)
    for batch in order:
        backward(batch)
        optimizer.step()
    return model


def merged_by_peft(model: PairModel) -> PairModel:
    """The same model, what PEFT put on it merged."""
    model.backbone = model.backbone.merge_and_unload()  # type: ignore[operator]
    return model


def errors(
    model: PairModel, tokens: Tokens, merge: Callable[..., Any] = dd.merge
) -> list[dict[str, Any]]:
    """A row a dtype: merged against adapted outputs (unit vectors), and against float64."""
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        exact = copy.deepcopy(model).double().eval().embed(tokens)
        for dtype in DTYPES:
            adapted = copy.deepcopy(model).to(dtype).eval()
            before = adapted.embed(tokens).double()
            after = merge(adapted).embed(tokens).double()
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "epsilon": torch.finfo(dtype).eps,
                    "merged_from_adapted": (after - before).abs().max().item(),
                    "adapted_from_float64": (before - exact).abs().max().item(),
                    "merged_from_float64": (after - exact).abs().max().item(),
                }
            )
    return rows


def latencies(
    ways: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Each way's seconds over those of the first, timed in turns: median and quartiles."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    first = np.array(seconds[next(iter(ways))])
    ratios = {name: np.quantile(np.array(taken) / first, [0.5, 0.25, 0.75])
              for name, taken in seconds.items()}  # fmt: skip
    return {name: (float(m), float(low), float(high)) for name, (m, low, high) in ratios.items()}


def measure(base: PairModel, task: Task, options: argparse.Namespace) -> pd.DataFrame:
    """A row a method and dtype, with the latency of the model as it was trained."""
    tokens = task.held_out.texts[: options.texts].trimmed()
    tables = []
    for method in ("LoRA", "DoRA"):
        recipe = Recipe(method, options.steps, options.batch_size, LEARNING_RATES[method])
        adapted = tuned(base, task, recipe).eval()
        merged: Any = dd.merge(copy.deepcopy(adapted))
        plain = {name: type(module) for name, module in base.named_modules()}
        assert {name: type(module) for name, module in merged.named_modules()} == plain
        with torch.no_grad():
            ratio = latencies(
                {
                    "original": partial(base.eval().embed, tokens),
                    "merged": partial(merged.embed, tokens),
                    "adapted": partial(adapted.embed, tokens),
                },
                options.rounds,
            )
        found = pd.DataFrame(errors(adapted, tokens)).assign(method=method)
        for name in ("merged", "adapted"):
            for ending, value in zip(("", "_low", "_high"), ratio[name], strict=True):
                found[f"{name}_latency{ending}"] = value
        tables.append(found)
        by_peft = tuned(base, task, recipe, adapt_by_peft).eval()
        rows = errors(by_peft, tokens, merged_by_peft)
        tables.append(pd.DataFrame(rows).assign(method=f"{method}, PEFT"))
    return pd.concat(tables, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Left: largest difference of outputs by dtype. Right: latency over the original's."""
    with drawing.panels(1, 2, height=2.5) as (figure, axes):
        error, latency = axes[0]
        dtypes = list(dict.fromkeys(table["dtype"]))
        x = np.arange(len(dtypes))
        for shift, (method, rows) in zip(
            (-0.24, -0.08, 0.08, 0.24), table.groupby("method"), strict=True
        ):
            name, by_peft = str(method).removesuffix(", PEFT"), str(method).endswith("PEFT")
            looks = {
                "color": drawing.METHOD_COLOURS[name], "markersize": 4,
                "fillstyle": "none" if by_peft else "full",
            }  # fmt: skip
            y = rows["merged_from_adapted"].clip(lower=NOTHING)
            error.plot(x + shift, y, drawing.METHOD_MARKERS[name], label=str(method), **looks)
        error.plot(x, rows["epsilon"], "_", color="#333333", markersize=22)
        error.plot([], [], "-", color="#333333", label="ε of the dtype")
        error.set_yscale("log")
        error.set_xticks(x, dtypes)
        ticks = [NOTHING, 1e-15, 1e-12, 1e-9, 1e-6, 1e-3]
        labels = ["none", *(f"$10^{{{round(math.log10(tick))}}}$" for tick in ticks[1:])]
        error.set_yticks(ticks, labels)
        error.minorticks_off()
        error.set_ylabel("largest difference of outputs")
        error.set_title("merged against adapted")
        places: list[str] = []
        for method, rows in table.dropna(subset=["merged_latency"]).groupby("method"):
            for state in ("merged", "adapted"):
                row, at = rows.iloc[0], len(places)
                middle = row[f"{state}_latency"]
                latency.hlines(
                    at, row[f"{state}_latency_low"], row[f"{state}_latency_high"], color="#333333"
                )
                latency.plot(
                    middle, at, drawing.METHOD_MARKERS[str(method)],
                    color=drawing.METHOD_COLOURS[str(method)],
                    fillstyle="full" if state == "merged" else "none",
                )  # fmt: skip
                latency.annotate(f"{middle:.2f}", (middle, at), (0, 6), ha="center", fontsize=6.5,
                                 textcoords="offset points")  # fmt: skip
                places.append(f"{method}, {state}")
        latency.set_yticks(range(len(places)), places)
        latency.set_ylim(len(places) - 0.4, -0.7)
        latency.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
        latency.set_xlabel("latency over that of the original model")
        latency.set_title("forward pass, float32")
        drawing.legend_below(figure, error, columns=5)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, merges, compares, times; writes the table and the figure."""
    parser = argparse.ArgumentParser(prog="python -m analyses.merge")
    starting_point.add_options(parser, examples=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--texts", type=int, default=32, help="texts in a forward pass")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each model")
    options = parser.parse_args(argv)
    started = starting_point.load(options, options.texts)
    task = started.task.to(torch.device(options.device))
    table = measure(started.base, task, options)
    write_tables(options.out, "merge", {"": table}, digits=4)
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "texts", "rounds")}
    write_about(options.out, "merge", settings | {"rank": 16, "seed": 0})
    files = save(draw(table), options.out / "figures" / "merge")
    print(table.to_string(index=False, float_format="{:.3g}".format))
    print(f"Wrote {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
