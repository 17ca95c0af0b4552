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
from matplotlib.patches import Patch

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
_FAST: Final = {"facecolor": "#0072B2", "edgecolor": "#0072B2"}
_LOW_RANK: Final = {"facecolor": "#D55E00", "edgecolor": "#D55E00"}
_HOLLOW: Final = {"facecolor": "white"}
LOOKS: Final[dict[str, dict[str, Any]]] = {
    "naive": {"facecolor": "#999999", "edgecolor": "#999999"},
    "naive, float64": {"facecolor": "white", "edgecolor": "#999999"},
    "built, then triton": {"facecolor": "#009E73", "edgecolor": "#009E73"},
    "numpy blocks": {"facecolor": "#56B4E9", "edgecolor": "#56B4E9"},
    "numba": _FAST,
    "triton": _FAST,
    "triton, to host": _FAST | _HOLLOW,
    "low rank": _LOW_RANK,
    "low rank, to host": _LOW_RANK | _HOLLOW,
}
"""How the bar of each way is drawn."""
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
    """One panel per machine, bars side by side per case: the fraction of bandwidth of each way."""
    tables = [in_order(table) for table in tables]
    lengths = [float(table["at"].max()) + 2 for table in tables]
    height = 1.2 + 0.3 * len(tables) + 0.07 * sum(lengths)
    looks: dict[str, Any] = {"sharex": True, "height_ratios": lengths}
    with drawing.panels(len(tables), 1, height=height, **looks) as (figure, axes):
        for panel, table, length in zip(axes[:, 0], tables, lengths, strict=True):
            for path, mine in table.groupby("path"):
                at, fraction = mine["at"], mine["fraction"]
                panel.barh(at, fraction, height=0.8, linewidth=0.7, **LOOKS[str(path)])
                panel.errorbar(
                    fraction, at, xerr=fraction * mine["spread"], fmt="none",
                    ecolor="#333333", elinewidth=0.7,
                )  # fmt: skip
                panel.vlines(mine["target"], at - 0.7, at + 0.7, color="black", linewidth=1.4)
            for _, ways in table.groupby("case", sort=False):
                ours = ways[~ways["path"].str.startswith("naive")]
                best = ours.sort_values("fraction").iloc[-1]
                said = f"{best['fraction']:.2f}, {best['times_naive_float64']:.0f}×"
                panel.annotate(said, (1.02, ways["at"].mean()), xycoords=BESIDE, va="center")
            panel.annotate("best way", (1.02, -2.5), xycoords=BESIDE, va="center")
            middles = table.groupby("case", sort=False)["at"].mean()
            panel.set_yticks(middles, middles.index)
            panel.tick_params(axis="y", length=0)
            panel.grid(visible=False, axis="y")
            panel.axvline(1, color="#333333", linewidth=0.8, linestyle=":", zorder=1)
            panel.set(xlim=(0, None), ylim=(length - 1, -1))
            panel.set_title(table["machine"].iloc[0], loc="left")
        axes[-1, 0].set_xlabel(
            "fraction of measured bandwidth (black: what is asked for; thin: half the "
            "interquartile range)\n"
            "best way: its fraction, and how many times faster it is than naive in float64"
        )
        seen = {path for table in tables for path in table["path"]}
        handles = [Patch(label=path, **look) for path, look in LOOKS.items() if path in seen]
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows as they are drawn, and where: case by case, its ways side by side."""
    case = table["case"].map({name: i for i, name in enumerate(dict.fromkeys(table["case"]))})
    path = table["path"].map(list(LOOKS).index)
    sorted_ = table.assign(case_at=case, path_at=path).sort_values(["case_at", "path_at"])
    return sorted_.assign(at=np.arange(len(sorted_)) + sorted_["case_at"])


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
