"""Run: `python -m analyses.growth [--quick] [--device cpu|cuda]`.

How the time of measuring grows: with parameters, with sites, with rank, with recorded steps.

`parameters`: 16 square weights, 1M to 6.7B parameters together on a GPU (bf16), to 268M on a CPU
(fp32), until every ΔM and ΔD is known. `sites`: weights of 256 × 256, 1 to 1024 of them. `rank`:
the sums of low-rank changes of 64 weights of 4096 × 4096 (on a CPU of one), ranks whose tiles the
GPU's kernel fills. `steps`: a recorder's time for so many recorded steps of full fine-tuning, its
rows in memory and on disk; the weights change between steps. Medians over turns in which every
size runs once. The line is the least-squares fit of time on size; R² is its, and the exponent that
of a power law through the points from a tenth of the largest size on, where fixed costs no longer
count.

A GPU reads while the host still queues: a call `alone` takes what the longer of the two takes. The
clock `behind` starts and stops on the GPU, where the same work waits behind other work until all of
it is queued, as a record's does in training.

Writes analyses/results/growth_<machine>.csv, anew after each growth, and figures/growth.{png,svg}
from the tables of all machines found there; `--redraw` only draws.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import dora_dynamics as dd
from analyses import _tables
from analyses._performance import SEED, by_wall, when_queued
from dora_dynamics._kernels import LowRankUpdate, low_rank_sums_of_all, queue_low_rank_sums
from dora_dynamics.effective import Dense
from dora_dynamics.measurement import Measurement, summarize_all
from dora_dynamics.plotting import save
from dora_dynamics.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dora_dynamics.measurement import Triple
    from dora_dynamics.sites import Site

    Found = dict[str, dict[int, list[float]]]

NAME: Final = "growth"
UNITS: Final = {
    "parameters": "million parameters",
    "sites": "weights of 256 × 256",
    "rank": "rank",
    "steps": "recorded steps",
}
CLOCKS: Final = {
    "alone": ("#0072B2", "o", "a call alone"),
    "behind": ("#009E73", "s", "behind other work"),
}
"""Colour, marker and name in the figure of each clock."""


@dataclass(frozen=True)
class Sizes:
    """The sizes at which each growth is measured.

    Attributes:
        widths: of the 16 square weights.
        sites: how many weights of 256 × 256.
        ranks: of the low-rank changes.
        width: of the weights below them.
        low_rank_sites: how many these are.
        steps: recorded steps.
        dtype: of the weights.
    """

    widths: tuple[int, ...]
    sites: tuple[int, ...]
    ranks: tuple[int, ...]
    width: int
    low_rank_sites: int
    steps: tuple[int, ...]
    dtype: torch.dtype


def sizes(device: str, quick: bool) -> Sizes:
    """What is measured on each kind of device."""
    if quick:
        return Sizes((8, 16, 24), (1, 2, 4), (1, 2, 4), 32, 1, (1, 2, 3), torch.float32)
    if device == "cpu":
        return Sizes(
            widths=(256, 512, 1024, 1536, 2048, 2896, 4096),
            sites=(1, 4, 16, 64, 128, 256, 512),
            ranks=(4, 8, 16, 32, 64, 96, 128),
            width=4096,
            low_rank_sites=1,
            steps=(5, 10, 20, 40, 60, 80),
            dtype=torch.float32,
        )
    return Sizes(
        widths=(256, 512, 1024, 2048, 4096, 8192, 12288, 16384, 20480),
        sites=(1, 4, 16, 64, 256, 512, 1024),
        ranks=(16, 32, 64, 128),
        width=4096,
        low_rank_sites=64,
        steps=(10, 25, 50, 100, 150, 200),
        dtype=torch.bfloat16,
    )


def sites_of(count: int) -> list[Site]:
    """So many linear sites, of a model that is not kept."""
    return find_sites(nn.ModuleList([nn.Linear(2, 2) for _ in range(count)]), ["*"])


def pair(width: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A random square weight, and the same after a change of 1%."""
    generator = torch.Generator(device).manual_seed(SEED)
    weight = torch.empty(width, width, device=device, dtype=dtype)
    weight.normal_(0, 0.02, generator=generator)
    change = torch.empty_like(weight).normal_(0, 2e-4, generator=generator)
    return weight, change.add_(weight)


@dataclass(frozen=True)
class Work:
    """What is timed, and the same without waiting for it."""

    done: Callable[[], object]
    queued: Callable[[], object]


def seconds(works: dict[int, Work], device: str, rounds: int) -> Found:
    """Seconds of each work by each clock, once a turn, after one turn to warm up."""
    clocks: dict[str, Callable[[Work], float]] = {"alone": lambda work: by_wall(work.done)}
    if device == "cuda":
        clocks["behind"] = lambda work: when_queued(work.queued)
    found: Found = {clock: {size: [] for size in works} for clock in clocks}
    for turn in range(-1, rounds):
        for clock, taken_by in clocks.items():
            for size, work in works.items():
                taken = taken_by(work)
                if turn >= 0:
                    found[clock][size].append(taken)
    return found


def measuring(weights: list[Triple]) -> Work:
    """The measuring of all of these."""

    def queue() -> Measurement:
        measurement = Measurement("output")
        measurement.add(weights)
        measurement.start()
        return measurement

    return Work(partial(summarize_all, weights, "output"), queue)


def with_parameters(chosen: Sizes, device: str, rounds: int) -> Found:
    """Seconds by the number of parameters; one size in memory at a time."""
    found: Found = {}
    sites = sites_of(16)
    for width in chosen.widths:
        pairs = [pair(width, device, chosen.dtype) for _ in sites]
        work = measuring([(s, w, Dense(v)) for s, (w, v) in zip(sites, pairs, strict=True)])
        for clock, times in seconds({16 * width * width: work}, device, rounds).items():
            found.setdefault(clock, {}).update(times)
    return found


def with_sites(chosen: Sizes, device: str, rounds: int) -> Found:
    """Seconds by the number of weights."""
    sites = sites_of(max(chosen.sites))
    pairs = [pair(256, device, chosen.dtype) for _ in sites]
    weights: list[Triple] = [(s, w, Dense(v)) for s, (w, v) in zip(sites, pairs, strict=True)]
    return seconds({n: measuring(weights[:n]) for n in chosen.sites}, device, rounds)


def with_rank(chosen: Sizes, device: str, rounds: int) -> Found:
    """Seconds by the rank of low-rank changes."""
    count = chosen.low_rank_sites
    bases = [pair(chosen.width, device, chosen.dtype)[0] for _ in range(count)]
    generator = torch.Generator(device).manual_seed(SEED + 1)
    works: dict[int, Work] = {}
    for rank in chosen.ranks:
        A = torch.randn(rank, chosen.width, generator=generator, device=device) / rank**0.5
        B = torch.randn(chosen.width, rank, generator=generator, device=device) * 2e-4
        updates = [LowRankUpdate(base, A, B, 1.0) for base in bases]
        works[rank] = Work(
            partial(low_rank_sums_of_all, updates), partial(queue_low_rank_sums, updates)
        )
    return seconds(works, device, rounds)


def with_steps(chosen: Sizes, device: str, rounds: int) -> Found:
    """Seconds of a recorder by the number of steps that it has recorded."""
    found: dict[int, list[float]] = {steps: [] for steps in chosen.steps}
    for turn in range(-1, rounds):
        torch.manual_seed(SEED)
        model = nn.Sequential(*[nn.Linear(384, 384) for _ in range(16)]).to(device)
        with tempfile.TemporaryDirectory() as folder:
            recorder = dd.Recorder(model, ["*"], every=1, run_dir=f"{folder}/run")
            recorder.record()
            taken = 0.0
            for step in range(1, max(chosen.steps) + 1):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.001)
                taken += by_wall(partial(recorded, recorder, step))
                if turn >= 0 and step in found:
                    found[step].append(taken)
            recorder.finish(record=False)
    return {"alone": found}


def recorded(recorder: dd.Recorder, step: int) -> None:
    """Record a step to the last byte on disk."""
    recorder.advance_to(step)
    recorder.state_dict()


def table_of(kind: str, clock: str, found: dict[int, list[float]]) -> pd.DataFrame:
    """One row per size, the fit beside each."""
    size = np.array(list(found), dtype=float)
    medians = np.array([np.median(times) for times in found.values()])
    low, high = np.array([np.quantile(times, [0.25, 0.75]) for times in found.values()]).T
    slope, intercept = np.polyfit(size, medians, 1)
    residual = medians - (intercept + slope * size)
    far = size >= size.max() / 10
    exponent = np.polyfit(np.log(size[far]), np.log(medians[far]), 1)[0]
    return pd.DataFrame(
        {
            "growth": kind,
            "clock": clock,
            "size": size.astype(np.int64),
            "median_ms": 1e3 * medians,
            "low_ms": 1e3 * low,
            "high_ms": 1e3 * high,
            "slope_ms": 1e3 * slope,
            "intercept_ms": 1e3 * intercept,
            "r_squared": 1 - residual.var() / medians.var(),
            "exponent": exponent,
        }
    )


def draw(tables: Sequence[pd.DataFrame]) -> Figure:
    """One row of panels per machine, one panel per growth, with a line for each clock."""
    figure = Figure(figsize=(10.0, 0.3 + 2.6 * len(tables)), layout="constrained")
    rows = figure.subplots(len(tables), len(UNITS), squeeze=False)
    for table, panels in zip(tables, rows, strict=True):
        for panel, (kind, unit) in zip(panels, UNITS.items(), strict=True):
            growths = table[table["growth"] == kind]
            if growths.empty:  # cut off before it was measured
                panel.set_axis_off()
                continue
            for clock, points in growths.groupby("clock", sort=False):
                color, marker, name = CLOCKS[str(clock)]
                size = points["size"].to_numpy() / (1e6 if kind == "parameters" else 1)
                median, first = points["median_ms"].to_numpy(), points.iloc[0]
                errors = [median - points["low_ms"], points["high_ms"] - median]
                fit = f"R² {first['r_squared']:.4f}, exp. {first['exponent']:.2f}"
                panel.errorbar(
                    size, median, yerr=errors, fmt=marker, color=color, markersize=3.5, lw=0.8,
                    label=f"{name}: {fit}",
                )  # fmt: skip
                line = first["intercept_ms"] + first["slope_ms"] * points["size"]
                panel.plot(size, line, color=color, lw=1)
            panel.legend(
                loc="lower left", bbox_to_anchor=(-0.05, 1.0), frameon=False, fontsize=7,
                handletextpad=0.2, borderpad=0.1, labelspacing=0.2,
            )  # fmt: skip
            panel.set(ylim=(0, None), xlim=(0, None))
            panel.set_xlabel(unit, fontsize=8)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"{table['machine'].iloc[0]}\nms", fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the table and the figure, and prints the fits."""
    parser = argparse.ArgumentParser(prog="python -m analyses.growth")
    parser.add_argument("--rounds", type=int, default=9, help="timings of each size")
    options = _tables.parsed(parser, argv)
    if not options.redraw:
        chosen = sizes(options.device, options.quick)
        rounds = 2 if options.quick else options.rounds
        tables = []
        for kind, measure, times in (
            ("parameters", with_parameters, rounds),
            ("sites", with_sites, rounds),
            ("rank", with_rank, rounds),
            ("steps", with_steps, min(3, rounds)),
        ):
            started = time.perf_counter()
            found = measure(chosen, options.device, times)
            tables += [table_of(kind, clock, by_size) for clock, by_size in found.items()]
            if options.device == "cuda":
                torch.cuda.empty_cache()
            for table in tables[-len(found) :]:
                print(table.to_string(index=False, float_format="{:.4g}".format))
            print(f"{time.perf_counter() - started:.0f} s", flush=True)
            _tables.write(NAME, pd.concat(tables, ignore_index=True), options)
    save(draw(_tables.stored(NAME, options.out)), options.out / "figures" / NAME)


if __name__ == "__main__":
    main()
