"""Run: `python -m analyses.adapter_cost [--quick] [--device cpu|cuda] [--rank R]`.

What LoRA and DoRA cost while they train, ours beside PEFT's, and nothing once merged.

One LLaMA-7B decoder layer (bf16; 4 × 1024 tokens on a GPU, 1 × 128 on a CPU) and BERT-base (fp32;
16 × 128, on a CPU 4 × 64), adapters of rank 16 on every linear layer. Times of forward and of
backward, medians over turns in which every variant runs once, in balanced orders: each in every
position, and right behind every other one, equally often. Peak memory of forward and backward
is what a GPU holds at most above the model, its adapters and their gradients; on any device, what
autograd keeps from forward to backward is counted too, each memory once, parameters left out.
DoRA with the norm a constant to the gradient (Sec. 4.3, `detached`) and with the exact gradient;
PEFT has the former only, and its rows are left out where it is not installed. `merged` is ours and
PEFT's after merging, and `original` the model before: forward without gradients, in turns of their
own, with the ratio to it in each turn. `original again` is the same model made anew: what its ratio
is away from 1 is the noise between two models whose memory lies elsewhere.

Writes analyses/results/adapter_cost_<machine>.csv, anew after each model, and
figures/adapter_cost.{png,svg} from the tables of all machines found there; `--redraw` only draws.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import dora_dynamics as dd
from analyses import _tables
from analyses._performance import balanced_orders, by_events, by_wall
from analyses._training import BERT_BASE, LLAMA_LAYER, Shape, batch_of, model_of
from dora_dynamics.plotting import save
from dora_dynamics.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn

NAME: Final = "adapter_cost"
RANK: Final = 16
AGAIN: Final = 2
"""Models that are made again, to see how much two of the same differ."""
COLOURS: Final = {"ours": "#0072B2", "PEFT": "#E69F00", "original": "#999999"}


@dataclass(frozen=True)
class Variant:
    """One way to adapt a model.

    Attributes:
        method: "LoRA", "DoRA" or "none".
        by: "ours", "PEFT" or "original".
        detached: whether the norm is a constant to the gradient.
        merged: whether the adapter is merged away.
        again: which of several of the same, 0 for the first.
    """

    method: str
    by: str
    detached: bool = False
    merged: bool = False
    again: int = 0

    @property
    def name(self) -> str:
        """As in the table."""
        if self.by == "original":
            return f"original again, {self.again}" if self.again else "original"
        kind = {True: " detached", False: " exact"}[self.detached] if self.method == "DoRA" else ""
        return f"{self.method}{'' if self.merged else kind}, {self.by}"


def variants() -> list[Variant]:
    """What is compared; without PEFT where it is not installed."""
    found = [
        Variant("none", "original"),
        Variant("LoRA", "ours"),
        Variant("DoRA", "ours", detached=True),
        Variant("DoRA", "ours"),
    ]
    merged = [Variant("none", "original", again=again) for again in range(1, AGAIN + 1)]
    merged.append(Variant("DoRA", "ours", detached=True, merged=True))
    if _tables.version("peft"):
        found += [Variant("LoRA", "PEFT"), Variant("DoRA", "PEFT", detached=True)]
        merged.append(Variant("DoRA", "PEFT", detached=True, merged=True))
    else:
        print("peft is not installed: its rows are left out.", flush=True)
    return found + merged


def shapes(device: str, quick: bool) -> list[Shape]:
    """The models that are adapted."""
    if quick:
        return [Shape("tiny BERT", "bert", 16, 24, 2, 2, 2, 50, 2, 8)]
    if device == "cpu":
        return [
            replace(LLAMA_LAYER, batch=1, sequence=128, dtype=torch.float32,
                    name="LLaMA-7B layer, fp32"),
            replace(BERT_BASE, batch=4, sequence=64),
        ]  # fmt: skip
    return [LLAMA_LAYER, BERT_BASE]


def adapted(variant: Variant, shape: Shape, device: str, rank: int) -> nn.Module:
    """The model with its adapters on every linear layer, whose B is not zero."""
    model = model_of(shape, device)
    if variant.by == "original":
        return model.requires_grad_(False)
    if variant.by == "ours":
        if variant.method == "LoRA":
            dd.apply_lora(model, shape.targets, rank=rank, alpha=rank)
        else:
            detach = variant.detached
            dd.apply_dora(model, shape.targets, rank=rank, alpha=rank, detach_norm=detach)
    else:
        import peft

        names = [site.name for site in find_sites(model, shape.targets)]
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=names, use_dora=variant.method == "DoRA"
        )
        model = peft.get_peft_model(model, config)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-3, generator=generator)
    if variant.merged:
        if variant.by == "ours":
            return dd.merge(model)
        unwrapped: Any = model
        merged: nn.Module = unwrapped.merge_and_unload()
        return merged
    return model


def measure(shape: Shape, device: str, rank: int, rounds: int) -> pd.DataFrame:
    """One row per variant of one model."""
    chosen = variants()
    models = {variant: adapted(variant, shape, device, rank) for variant in chosen}
    batch = batch_of(shape, device)
    times: dict[Variant, NDArray[np.float64]] = {}
    for still in (False, True):
        group = [variant for variant in chosen if is_still(variant) == still]
        timed = forward_only if still else forward_and_backward
        works = [partial(timed, models[variant], batch, device) for variant in group]
        times |= dict(zip(group, in_balanced_turns(works, rounds), strict=True))
    rows = []
    for variant, model in models.items():
        seconds = times[variant]
        forward, backward = 1e3 * np.median(seconds, axis=0)
        low, high = np.quantile(seconds.sum(axis=1), [0.25, 0.75])
        row: dict[str, object] = {"model": shape.name, "variant": variant.name}
        row |= {"method": variant.method, "by": variant.by, "detached": variant.detached}
        row |= {"merged": variant.merged, "batch": shape.batch, "sequence": shape.sequence}
        row |= {"rank": rank, "rounds": len(seconds)}
        row |= {"forward_ms": forward, "backward_ms": backward}
        row["spread"] = (high - low) / 2 / float(np.median(seconds.sum(axis=1)))
        still = is_still(variant)
        row["peak_mb"] = np.nan if still else peak_memory(model, batch) / 1e6
        row["kept_mb"] = np.nan if still else kept_memory(model, batch) / 1e6
        if still:
            ratios = seconds[:, 0] / times[chosen[0]][:, 0]
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            row |= {"latency_ratio": middle, "ratio_low": low, "ratio_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def in_balanced_turns(
    works: Sequence[Callable[[], tuple[float, float]]], rounds: int
) -> list[NDArray[np.float64]]:
    """What each work returns, once a turn, in orders that favour none; at least so many turns.

    Returns:
        One array for each work, shape (turns, 2).
    """
    orders = balanced_orders(len(works))
    found: list[list[tuple[float, float]]] = [[] for _ in works]
    for work in works:
        work()
    for _ in range(-(-rounds // len(orders))):
        for order in orders:
            for i in order:
                found[i].append(works[i]())
    return [np.array(times) for times in found]


def is_still(variant: Variant) -> bool:
    """Whether nothing trains, so that only the forward pass is timed."""
    return variant.merged or variant.by == "original"


def timer(device: str) -> Callable[[Callable[[], object]], float]:
    """What times work on a device."""
    return by_wall if device == "cpu" else by_events


def forward_only(
    model: nn.Module, batch: dict[str, torch.Tensor], device: str
) -> tuple[float, float]:
    """Seconds of a forward pass without gradients, and 0."""
    model.eval()
    with torch.no_grad():
        return timer(device)(lambda: model(**batch)), 0.0


def forward_and_backward(
    model: nn.Module, batch: dict[str, torch.Tensor], device: str
) -> tuple[float, float]:
    """Seconds of each."""
    model.train()
    model.zero_grad(set_to_none=True)
    losses: list[torch.Tensor] = []
    forward = timer(device)(lambda: losses.append(model(**batch).loss))
    return forward, timer(device)(lambda: torch.autograd.backward(losses.pop()))


def peak_memory(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Bytes a GPU holds at most in forward and backward, above what it held before."""
    if next(model.parameters()).device.type != "cuda":
        return float("nan")
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.backward(model(**batch).loss)
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def kept_memory(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    kept.clear()
    torch.autograd.backward(loss)
    return float(size)


def draw(tables: Sequence[pd.DataFrame]) -> Figure:
    """Per machine and model: time, memory, and the latency after merging."""
    groups = [(t["machine"].iloc[0], model, t[t["model"] == model].reset_index(drop=True))
              for t in tables for model in t["model"].unique()]  # fmt: skip
    figure = Figure(figsize=(9.0, 0.5 + 2.1 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 3, squeeze=False, width_ratios=[3, 2, 1.3])
    for (kind, model, table), (times, memory, latency) in zip(groups, panels, strict=True):
        trained = table[~table["merged"] & (table["by"] != "original")]
        at = np.arange(len(trained))
        colours = [COLOURS[by] for by in trained["by"]]
        times.barh(at, trained["forward_ms"], color=colours, alpha=0.55)
        left = trained["forward_ms"]
        times.barh(at, trained["backward_ms"], left=left, color=colours)
        times.set_yticks(at, trained["variant"], fontsize=7)
        batch, sequence = trained["batch"].iloc[0], trained["sequence"].iloc[0]
        times.set_title(f"{model}, {batch}×{sequence} ({kind})", fontsize=8, loc="left")
        times.set_xlabel("ms: forward (pale) and backward", fontsize=7)
        column = "peak_mb" if trained["peak_mb"].notna().all() else "kept_mb"
        memory.barh(at, trained[column], color=colours)
        words = {"peak_mb": "peak of forward and backward, MB", "kept_mb": "kept for backward, MB"}
        memory.set_xlabel(words[column], fontsize=7)
        memory.set_yticks(at, [""] * len(at))
        merged = table[table["merged"] | table["variant"].str.startswith("original again")]
        at = np.arange(len(merged))
        ratio = merged["latency_ratio"].to_numpy()
        errors: NDArray[np.float64] = np.abs(
            merged[["ratio_low", "ratio_high"]].to_numpy().T - ratio
        )
        colours = [COLOURS[by] for by in merged["by"]]
        latency.errorbar(ratio, at, xerr=errors, fmt="none", ecolor="#333333", elinewidth=0.8)
        latency.scatter(ratio, at, color=colours, zorder=3)
        latency.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
        names = merged["by"].replace("original", "original,\nagain")
        latency.set_yticks(at, names, fontsize=7)
        reach = max(
            0.05, 1.2 * float(np.abs(merged[["ratio_low", "ratio_high"]] - 1).to_numpy().max())
        )
        latency.set(xlim=(1 - reach, 1 + reach), ylim=(len(at) - 0.5, -0.5))
        latency.set_xlabel("merged: latency / original", fontsize=7)
        for panel in (times, memory):
            panel.invert_yaxis()
        for panel in (times, memory, latency):
            panel.tick_params(axis="x", labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the table and the figure, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m analyses.adapter_cost")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each variant, at least")
    options = _tables.parsed(parser, argv)
    if not options.redraw:
        tables = []
        rounds = 2 if options.quick else options.rounds
        for shape in shapes(options.device, options.quick):
            tables.append(measure(shape, options.device, options.rank, rounds))
            columns = ["model", "variant", "forward_ms", "backward_ms", "spread", "peak_mb"]
            columns += ["kept_mb", "latency_ratio"]
            text = tables[-1][columns].to_string(index=False, float_format="{:.3g}".format)
            _tables.write(NAME, pd.concat(tables, ignore_index=True), options)
            print(text, flush=True)
    save(draw(_tables.stored(NAME, options.out)), options.out / "figures" / NAME)


if __name__ == "__main__":
    main()
