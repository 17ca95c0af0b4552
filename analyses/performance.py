"""Run: `python -m analyses.performance [--quick] [--device cpu|cuda]`.

How fast each path of `dora_dynamics._kernels` reads weights, beside the limit and the naive ways.

All ways of one case are timed in turns, in one run: median, and spread as half the interquartile
range over it. `fraction` is of the bandwidth measured in the same turns: on a GPU that of a large
device-to-device copy (bytes read plus written), on the CPU that of memcmp over the same buffers
(for weights that fit in a cache: over the first case's). The naive ways are the difference of two
norms and `1 − cosine_similarity`, in the weights' own dtype and, because that is wrong, in float64.
A low-rank change is held against the same after building W', in float32 and float64; its bytes
are those of W_0. "To host" is wall time until all numbers are in host memory; other rows of a GPU
are device time, ours through a captured graph, so that gaps between launches do not count.

Writes analyses/results/performance_<machine>.csv, anew after each case, and
figures/performance.{png,svg} from the tables of all machines found there; `--redraw` only draws.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter

from analyses import _drawing as drawing
from analyses import _tables
from analyses._performance import (
    Case,
    cpu_ways,
    exact,
    extra_memory,
    gpu_ways,
    in_turns,
    relative_error,
    weights,
)
from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

LLAMA_LAYER: Final = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
NAME: Final = "performance"
LIMITS: Final = ("read", "copy")
CACHE: Final = 1 << 28
"""Bytes of data below which a bandwidth measured over them may be a cache's."""
TARGETS: Final = {
    ("LLaMA-7B, bf16", "triton"): 0.9,
    ("BERT-base, fp32", "triton"): 0.9,
    ("MiniLM, fp32", "triton"): 0.6,
    ("4096×4096, fp32", "numpy blocks"): 0.3,
    ("4096×4096, fp32", "numba"): 0.6,
    ("4096×4096, bf16", "numpy blocks"): 0.15,
    ("4096×4096, bf16", "numba"): 0.4,
}
"""The fraction of bandwidth that a way is to reach, by case and way."""
_FAST: Final = {"color": "#0072B2", "marker": "o"}
_LOW_RANK: Final = {"color": "#D55E00", "marker": "D"}
_HOLLOW: Final = {"markerfacecolor": "white"}
LOOKS: Final[dict[str, dict[str, Any]]] = {
    "naive": {"color": "#999999", "marker": "x"},
    "naive, float64": {"color": "#999999", "marker": "+"},
    "built, then triton": {"color": "#009E73", "marker": "v"},
    "numpy blocks": {"color": "#56B4E9", "marker": "s"},
    "numba": _FAST,
    "triton": _FAST,
    "triton, to host": _FAST | _HOLLOW,
    "low rank": _LOW_RANK,
    "low rank, to host": _LOW_RANK | _HOLLOW,
}
"""How each way is drawn."""
_POINT: Final[dict[str, Any]] = {"linestyle": "none", "markersize": 5}
BESIDE: Final = ("axes fraction", "data")


def transformer(layers: int, width: int, inner: int) -> list[tuple[int, int]]:
    """Shapes of a BERT-like encoder's matrices."""
    return ([(width, width)] * 4 + [(inner, width), (width, inner)]) * layers


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on each kind of device."""
    half, single = torch.bfloat16, torch.float32
    if quick:
        return [
            Case("64×96, fp32", [(64, 96)] * 2, single),
            Case("64×96, bf16", [(64, 96)], half),
            Case("64×96, bf16, rank 4", [(64, 96)], half, rank=4),
        ]
    if device == "cpu":
        return [
            Case("4096×4096, fp32", [(4096, 4096)], single, sets=4),
            Case("4096×4096, bf16", [(4096, 4096)], half, sets=8),
            Case("4096×4096, fp16", [(4096, 4096)], torch.float16, sets=8),
            Case("Conv1D 768×3072, fp32", [(3072, 768)] * 12, single, sets=2, transposed=True),
            Case("384×384, fp32", [(384, 384)], single),
            Case("768×768, fp32", [(768, 768)], single),
            Case("384×384, bf16", [(384, 384)], half),
            Case("768×768, bf16", [(768, 768)], half),
            Case("MiniLM, fp32", transformer(6, 384, 1536), single, sets=4),
            Case("4096×4096, fp32, rank 16", [(4096, 4096)], single, rank=16),
            Case("4096×4096, fp32, rank 128", [(4096, 4096)], single, rank=128),
        ]
    return [
        Case("LLaMA-7B, bf16", LLAMA_LAYER * 32, half),
        Case("28672×8192, bf16", [(28672, 8192)], half, sets=2),
        Case("BERT-base, fp32", transformer(12, 768, 3072), single, sets=2),
        Case("MiniLM, fp32", transformer(6, 384, 1536), single, sets=6),
        Case("GPT-2 Conv1D, fp32", transformer(12, 768, 3072), single, sets=2, transposed=True),
        Case("LLaMA-7B, bf16, rank 16", LLAMA_LAYER * 32, half, rank=16),
        Case("LLaMA-7B, bf16, rank 128", LLAMA_LAYER * 32, half, rank=128),
        Case("LLaMA-7B layer, fp32, rank 16", LLAMA_LAYER, single, rank=16),
    ]


def measure(case: Case, device: str, rounds: int, limit: float) -> pd.DataFrame:
    """One row per way; `limit` is the bandwidth to compare with where none is measured here."""
    sets = weights(case, device)
    reference = exact(case, sets[0])
    ways = cpu_ways(case, sets) if device == "cpu" else gpu_ways(case, sets)
    seconds = in_turns(ways, rounds, device)
    itemsize = torch.empty((), dtype=case.dtype).element_size()
    elements = sum(units * features for units, features in case.shapes)
    size = itemsize * elements * (1 if case.rank else 2)
    if "copy" in ways:
        limit = 4 * 2 * (1 << 29) / float(np.median(seconds["copy"]))
    elif "read" in ways and (size * case.sets >= CACHE or not limit):
        limit = size / float(np.median(seconds["read"]))
    naive, right = (float(np.median(seconds[name])) for name in ("naive", "naive, float64"))
    rows = []
    for name, way in ways.items():
        median = float(np.median(seconds[name]))
        low, high = np.quantile(seconds[name], [0.25, 0.75])
        row = {"case": case.name, "path": name, "matrices": len(case.shapes), "bytes": size}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "rank": case.rank}
        row |= {"median_ms": 1e3 * median, "spread": (high - low) / 2 / median}
        fraction = 1.0 if name in LIMITS else size / median / limit
        row |= {"fraction": fraction, "limit_gb_per_s": limit / 1e9}
        row |= {"times_naive": naive / median, "times_naive_float64": right / median}
        row["extra_mb"] = extra_memory(way.uncaptured or way.run) / 1e6
        row["target"] = TARGETS.get((case.name, name))
        row["relative_error"] = relative_error(way.result, reference) if way.result else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def draw(tables: Sequence[pd.DataFrame]) -> Figure:
    """One panel per machine, a line per case: the fraction of bandwidth of each way."""
    cases_of = [list(dict.fromkeys(table["case"])) for table in tables]
    lines = [len(names) for names in cases_of]
    height = 1.2 + 0.3 * len(tables) + 0.17 * sum(lines)
    looks: dict[str, Any] = {"sharex": True, "height_ratios": lines}
    with drawing.panels(len(tables), 1, height=height, **looks) as (figure, axes):
        for panel, table, names in zip(axes[:, 0], tables, cases_of, strict=True):
            for path, look in LOOKS.items():
                mine = table[table["path"] == path]
                at = mine["case"].map(names.index)
                panel.plot(mine["fraction"], at, **_POINT, **look)
                asked = {"color": look["color"], "markersize": 11, "markeredgewidth": 2}
                panel.plot(mine["target"], at, "|", zorder=1, **asked)
            ours = table[~table["path"].str.startswith("naive")]
            best = ours.loc[ours.groupby("case")["fraction"].idxmax()].set_index("case")
            for line, case in enumerate(names):
                fraction, times = best.loc[case, ["fraction", "times_naive_float64"]]
                said = f"{fraction:.2f}, {times:.0f}×"
                panel.annotate(said, (1.02, line), xycoords=BESIDE, va="center")
            panel.annotate("best way", (1.02, -1.1), xycoords=BESIDE, va="center")
            panel.set_yticks(range(len(names)), names)
            panel.axvline(1, color="#333333", linewidth=0.8, linestyle=":", zorder=1)
            panel.set(xscale="log", ylim=(len(names) - 0.4, -0.6))
            panel.set_title(table["machine"].iloc[0], loc="left")
        axes[-1, 0].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[-1, 0].set_xlabel(
            "fraction of measured bandwidth (a bar: what is asked of the way of that colour)\n"
            "best way: its fraction, and how many times faster it is than naive in float64"
        )
        seen = {path for table in tables for path in table["path"]}
        handles = [
            Line2D([], [], label=path, **_POINT, **look)
            for path, look in LOOKS.items()
            if path in seen
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the table and the figure, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m analyses.performance")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each way")
    options = _tables.parsed(parser, argv)
    if not options.redraw:
        tables: list[pd.DataFrame] = []
        limit = 0.0
        rounds = 2 if options.quick else options.rounds
        for case in cases(options.device, options.quick):
            started = time.perf_counter()
            table = measure(case, options.device, rounds, limit)
            limit = limit or 1e9 * float(table["limit_gb_per_s"].iloc[0])
            tables.append(table)
            shown = ["case", "path", "median_ms", "spread", "fraction", "target"]
            shown += ["times_naive", "times_naive_float64", "extra_mb", "relative_error"]
            text = table[shown].to_string(index=False, float_format="{:.3g}".format)
            _tables.write(NAME, pd.concat(tables, ignore_index=True), options)
            print(f"{text}\n{time.perf_counter() - started:.0f} s", flush=True)
    stored = [t[~t["path"].isin(LIMITS)] for t in _tables.stored(NAME, options.out)]
    save(draw(stored), options.out / "figures" / NAME)


if __name__ == "__main__":
    main()
