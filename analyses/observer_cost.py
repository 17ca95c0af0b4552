"""Run: `python -m analyses.observer_cost [--quick] [--device cpu|cuda]`.

What recording every linear weight costs the training it watches, at every step and at every 100th.

One process trains a model in blocks of a few steps, in turns without and with a recorder that
records every step (into a run directory): a 1.1B-parameter LLaMA shape in bf16 with batch 8 × 1024
tokens on a GPU (and 1 × 512 as a hard case), MiniLM with batch 32 × 64 on a CPU; real forward and
backward, AdamW. Full fine-tuning with W_0 on the device, in pinned host memory and in the mapped
checkpoint; LoRA and DoRA of rank 16 on every linear layer, whose W_0 is not copied.

`cost` is the median over pairs of blocks of the difference, with its quartiles; a recorded block
begins behind a recorded step, so that rows of the step before are formed during it as they always
are. `share` is of the time of a step without. Every 100th step: the cost of one recorded step and
99 times what the hooks take on a step that is not recorded, measured on the host, over 100 steps;
timed directly it is far below the noise. Memory: W_0's copies by where they are, what the device
holds more with the recorder than without, and what one recording takes for its moment.

Writes analyses/results/observer_cost_<machine>.csv, anew after each row, and
figures/observer_cost.{png,svg} from the tables of all machines found there; `--redraw` only draws.
On a GPU all of it is made for 80 s.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

import dora_dynamics as dd
from analyses import _tables
from analyses._performance import wait_for_gpu
from analyses._training import LLAMA_1B, MINILM, Shape, adamw, adapt, batch_of, model_of, stepper
from analyses._training import seconds_of as seconds_a_step
from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

NAME: Final = "observer_cost"
RANK: Final = 16
TARGET, TARGET_100 = 0.05, 0.001
"""Shares of training time that recording full fine-tuning is to stay under."""
SHOWN: Final = 32.0
"""Per cent at which the figure's axis ends."""


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        shape: the model and its batch.
        method: "FT", "LoRA" or "DoRA".
        place: where W_0 is kept.
        rounds: pairs of blocks, at most.
        steps: steps of a block.
        seconds: after so many no further pair is begun, from the second on.
    """

    shape: Shape
    method: str
    place: str
    rounds: int
    steps: int
    seconds: float = 60.0


def settings(device: str, quick: bool) -> list[Setting]:
    """What is measured on each kind of device, the settings of one model together."""
    if quick:
        tiny = Shape("tiny LLaMA", "llama", 32, 48, 2, 4, 2, 50, 2, 8)
        small = [("FT", "device"), ("FT", "host"), ("FT", "file"), ("LoRA", "device")]
        return [Setting(tiny, method, place, 2, 1) for method, place in small]
    if device == "cpu":
        full = [Setting(MINILM, "FT", "device", 9, 3), Setting(MINILM, "FT", "file", 5, 3)]
        return full + [Setting(MINILM, method, "device", 5, 3) for method in ("LoRA", "DoRA")]
    small_batch = replace(LLAMA_1B, batch=1, sequence=512)
    return [  # the asked first, and all of it within 80 s
        Setting(LLAMA_1B, "FT", "device", 8, 5, 13.0),
        Setting(small_batch, "FT", "device", 8, 6, 5.0),
        Setting(LLAMA_1B, "LoRA", "device", 5, 3, 6.0),
        Setting(LLAMA_1B, "DoRA", "device", 5, 3, 6.0),
        Setting(LLAMA_1B, "FT", "host", 4, 3, 5.0),
        Setting(LLAMA_1B, "FT", "file", 3, 2, 5.0),
    ]


def measure(setting: Setting, device: str, folder: Path) -> dict[str, object]:
    """One row: time and memory of the training without and with a recorder."""
    shape, on_gpu = setting.shape, device == "cuda"
    model = model_of(shape, device)
    options: dict[str, Any] = {"baseline_place": setting.place}
    if setting.place == "file":
        options["baseline"] = folder / "model.safetensors"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, options["baseline"])
    adapt(model, setting.method, shape.targets, RANK)
    optimizer = adamw(model, device)
    step = stepper(model, optimizer, batch_of(shape, device))
    for _ in range(2):
        step()
    wait_for_gpu()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    recorder = dd.Recorder(
        model, shape.targets, every=1, run_dir=folder / "run", overwrite=True, **options
    )
    recorder.start(optimizer)
    recorder.finish()
    wait_for_gpu()
    device_mb = (torch.cuda.memory_allocated() - held) / 1e6 if on_gpu else np.nan

    plain, recorded = in_turns(recorder, optimizer, step, setting)
    differences = recorded - plain
    base = float(np.median(plain))
    low, cost, high = np.quantile(differences, [0.25, 0.5, 0.75])
    hook = hook_seconds(recorder, optimizer, step, setting.steps)
    return {
        "model": shape.name,
        "method": setting.method,
        "place": setting.place,
        "batch": shape.batch,
        "sequence": shape.sequence,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sites": len(recorder.sites),
        "followed_parameters": sum(w.numel() for w in recorder._baseline.weights.values()),
        "step_ms": 1e3 * base,
        "recorded_ms": 1e3 * float(np.median(recorded)),
        "cost_ms": 1e3 * cost,
        "cost_low_ms": 1e3 * low,
        "cost_high_ms": 1e3 * high,
        "share": cost / base,
        "share_low": low / base,
        "share_high": high / base,
        "hook_ms": 1e3 * hook,
        "share_every_100": (max(cost, 0.0) + 99 * hook) / (100 * base),
        "target": TARGET if setting.method == "FT" and setting.place == "device" else np.nan,
        **copies(recorder, model, setting.place),
        "device_mb": device_mb,
        "passing_mb": passing(recorder) / 1e6 if on_gpu else np.nan,
        "rounds": len(plain),
        "steps": setting.steps,
    }


def in_turns(
    recorder: dd.Recorder,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], None],
    setting: Setting,
) -> tuple[Any, Any]:
    """Seconds a step of each block, without and with recording, the two in alternating order."""
    found: dict[bool, list[float]] = {False: [], True: []}
    end = time.perf_counter() + setting.seconds
    for turn in range(setting.rounds):
        if turn >= 2 and time.perf_counter() > end:
            break
        for watched in (bool(turn % 2), not turn % 2):
            if watched:
                recorder.start(optimizer)
            step()
            found[watched].append(seconds_a_step(step, setting.steps))
            if watched:
                recorder.finish(record=False)
    return np.array(found[False]), np.array(found[True])


def hook_seconds(
    recorder: dd.Recorder, optimizer: torch.optim.Optimizer, step: Callable[[], None], times: int
) -> float:
    """Seconds of the host in the recorder's hooks on a step that is not recorded."""
    recorder._wanted = lambda _: False
    marks: list[float] = []

    def mark(*_: object) -> None:
        marks.append(time.perf_counter())

    handles = [optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]
    recorder.start(optimizer)
    handles += [optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]
    for _ in range(times + 1):
        step()
    recorder.finish(record=False)
    for handle in handles:
        handle.remove()
    spent = np.diff(np.array(marks).reshape(-1, 4), axis=1)[:, ::2].sum(axis=1)
    return float(np.median(spent))


def copies(recorder: dd.Recorder, model: nn.Module, place: str) -> dict[str, object]:
    """Megabytes of W_0 that are not the model's own weights, and where they are."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    others = [w for w in recorder._baseline.weights.values() if w.data_ptr() not in own]
    size = sum(weight.nbytes for weight in others) / 1e6
    return {"copied_mb": 0.0 if place == "file" else size, "mapped_mb": size * (place == "file")}


def passing(recorder: dd.Recorder) -> float:
    """Bytes a GPU holds at most while one step is recorded, above what it held before."""
    wait_for_gpu()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    recorder.finish()
    wait_for_gpu()
    return float(torch.cuda.max_memory_allocated() - before)


def draw(tables: Sequence[pd.DataFrame]) -> Figure:
    """One panel per machine: the share of training time of each setting, and its memory.

    A long bar has its number inside, and an arrow where it leaves the axis.
    """
    heights = [len(table) for table in tables]
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, table in zip(panels, tables, strict=True):
        at = np.arange(len(table))
        share = 100 * table["share"]
        errors = [share - 100 * table["share_low"], 100 * table["share_high"] - share]
        panel.barh(at, share, xerr=errors, color="#0072B2", height=0.6, error_kw={"lw": 0.8})
        panel.plot(100 * table["target"], at, "|", color="#D55E00", markersize=14, mew=2.5)
        end = 100 * table[["share", "share_high", "target"]].max(axis=1)
        for y, x, row in zip(at, end, table.to_dict("records"), strict=True):
            copied, mapped = row["copied_mb"], row["mapped_mb"]
            memory = f"{copied:.0f} MB copied" if copied else "no copy"
            memory = f"{mapped:.0f} MB mapped" if mapped else memory
            bar = min(100 * row["share"], SHOWN)
            inside = bar > 0.6 * SHOWN
            panel.annotate(
                f"{100 * row['share']:.1f}% ({row['cost_ms']:.1f} of {row['step_ms']:.0f} ms), "
                f"every 100th {100 * row['share_every_100']:.2g}%, {memory}"
                + (" →" if bar == SHOWN else ""),
                (min(bar, 100 * row["share_low"]) if inside else max(x, 0), y),
                (-6 if inside else 6, 0),
                textcoords="offset points", va="center", fontsize=7,
                ha="right" if inside else "left", color="white" if inside else "black",
            )  # fmt: skip
        names = table["method"] + ", W₀ " + table["place"].map(_tables.PLACES)
        sizes = table["batch"].astype(str) + "×" + table["sequence"].astype(str)
        panel.set_yticks(at, table["model"] + ", " + sizes + "\n" + names, fontsize=7)
        panel.set(xlim=(min(0.0, float(share.min())), SHOWN), ylim=(len(table) - 0.5, -0.5))
        panel.set_title(table["machine"].iloc[0], fontsize=9, loc="left")
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(
        "time of a step, in %, that recording it adds (orange: asked for)", fontsize=9
    )
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the table and the figure, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m analyses.observer_cost")
    options = _tables.parsed(parser, argv)
    rows = []
    if not options.redraw:
        for setting in settings(options.device, options.quick):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(setting, options.device, Path(folder)))
            if options.device == "cuda":
                torch.cuda.empty_cache()
            _tables.write(NAME, pd.DataFrame(rows), options)  # now: what follows may be cut off
            print(", ".join(f"{k} {_tables.shown(v)}" for k, v in rows[-1].items()), flush=True)
    save(draw(_tables.stored(NAME, options.out)), options.out / "figures" / NAME)


if __name__ == "__main__":
    main()
