"""Run: `python -m analyses.scale [--quick]`.

What a record costs when 8B, 70B and 405B models train on 8 to 1,024 devices: a model on paper.

Measured: how fast sums are read, and what bringing a unit's sums to the host adds, from the H100's
rows of `analyses/results/performance_nvidia-h100-80gb-hbm3.csv`; what a unit costs the host
(magnitudes, rows, rank correlations), on this machine. Counted: the bytes of the all-reduce, by
the recorder's own code on one process of a group that is not there (`simulated_bytes`), and held
against the formula. Assumed: `ASSUMPTIONS`. The recorder follows every linear layer, weights are
sharded by FSDP2 over all devices; FT in fp32 shards with W_0 beside them, LoRA of rank 16 on frozen
bf16.

Writes analyses/results/scale.csv and figures/scale.{png,svg}.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from dora_dynamics._kernels.sums import from_array
from dora_dynamics.decomposition import reduce_units, unit_change
from dora_dynamics.effective import Dense
from dora_dynamics.measurement import measure_all
from dora_dynamics.plotting import save
from dora_dynamics.provenance import machine, versions
from dora_dynamics.sharded import ShardingError
from dora_dynamics.sites import Site
from dora_dynamics.trajectory import trajectory_row

if TYPE_CHECKING:
    from collections.abc import Sequence

MEASURED: Final = Path(__file__).parent / "results" / "performance_nvidia-h100-80gb-hbm3.csv"
DEVICES: Final = (8, 16, 32, 64, 128, 256, 512, 1024)
RANK: Final = 16
ASSUMPTIONS: Final = {
    "devices_per_host": 8,
    "gb_per_s_within_a_host": 300.0,  # of an all-reduce, per device, over NVLink
    "gb_per_s_between_hosts": 40.0,  # per device, over one 400 Gb/s adapter each
    "seconds_per_hop": 20e-6,  # an all-reduce takes 2 log2(devices) of them
    "gb_per_s_to_the_host": 10.0,  # the buffer of sums goes up and down, from pageable memory
    "tokens_per_device": 16384,
    "flops": 989e12 * 0.4,  # of a device in training
    "bytes_of_memory": 80e9,
    "bytes_per_trained_weight": 16,  # fp32 weight, gradient, two moments
}


@dataclass(frozen=True)
class Shape:
    """A decoder of the LLaMA 3 family: layers, width, width of keys, inner width."""

    layers: int
    width: int
    keys: int
    inner: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of the linear layers of one layer."""
        w, k, n = self.width, self.keys, self.inner
        return [(w, w), (k, w), (k, w), (w, w), (n, w), (n, w), (w, n)]

    @property
    def weights(self) -> int:
        """Elements of all linear layers."""
        return self.layers * sum(out * features for out, features in self.matrices)

    @property
    def units(self) -> int:
        """Output features of all linear layers."""
        return self.layers * sum(out for out, _ in self.matrices)

    @property
    def sites(self) -> int:
        """How many linear layers there are."""
        return self.layers * len(self.matrices)


MODELS: Final = {
    "8B": Shape(32, 4096, 1024, 14336),
    "70B": Shape(80, 8192, 1024, 28672),
    "405B": Shape(126, 16384, 1024, 53248),
}


def wire_bytes(units: int, sites: int) -> int:
    """Bytes of the all-reduced buffer: four sums a unit, and of each site four numbers."""
    return 8 * (4 * units + 4 * sites)


def simulated_bytes(matrices: Sequence[tuple[int, int]], devices: int, rank: int) -> int:
    """What one process of `devices` hands to the all-reduce of these weights, by our own code."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=devices, store=FakeStore())
    counted: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        counted.append(tensor.numel() * tensor.element_size())

    try:
        mesh = init_device_mesh("cpu", (devices,))
        triples: list[Any] = []
        for i, (out, features) in enumerate(matrices):
            rows = -(-out // devices)
            local = torch.zeros(max(0, min(rows, out - rank * rows)), features)
            weight = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size((out, features)),
                stride=(features, 1),
            )  # fmt: skip
            triples.append((Site(f"w{i}", 0, "", "up"), weight, Dense(weight)))
        dist.all_reduce = counting
        with suppress(ShardingError):  # the other processes' parts never come
            measure_all(triples, "output")
    finally:
        dist.all_reduce = original
        dist.destroy_process_group()
    return sum(counted)


def fitted(measured: pd.DataFrame) -> dict[str, float]:
    """Bytes a second of dense and low-rank sums, seconds a record and a unit to the host."""
    by: Any = measured.set_index(["case", "path"])
    dense, low = (
        by.loc[("LLaMA-7B, bf16", "triton")],
        by.loc[("LLaMA-7B, bf16, rank 16", "low rank")],
    )
    llama = 32 * (4 * 4096 + 2 * 11008 + 4096)
    units = {"LLaMA-7B, bf16": llama, "28672×8192, bf16": 28672, "BERT-base, fp32": 12 * 6912}
    extra = [
        1e-3
        * (by.loc[(case, "triton, to host"), "median_ms"] - by.loc[(case, "triton"), "median_ms"])
        for case in units
    ]
    per_unit, start = np.polyfit(list(units.values()), extra, 1)
    return {
        "dense_bytes_per_s": float(dense["bytes"] / dense["median_ms"] * 1e3),
        "low_rank_bytes_per_s": float(low["bytes"] / low["median_ms"] * 1e3),
        "seconds_per_unit": float(per_unit),
        "seconds_per_record": max(0.0, float(start)),
    }


def host_seconds_per_unit(units: int, rounds: int = 50) -> float:
    """Magnitudes, measures and a row from the sums of a matrix of so many units; the fastest."""
    sums = np.random.default_rng(0).random((4, units)) + np.array([[10], [0], [1], [0.5]])
    site, spent = Site("w", 0, "", "up"), []
    for _ in range(rounds):
        begin = time.perf_counter()
        change = reduce_units(unit_change(from_array(sums.copy())), "output")
        trajectory_row(site, change, run="r", method="FT", step=1)
        spent.append(time.perf_counter() - begin)
    return min(spent) / units


def cost(
    name: str, method: str, devices: int, fit: dict[str, float], host: float
) -> dict[str, Any]:
    """One row: bytes read, bytes on the wire, memory and time, a device each."""
    shape, known = MODELS[name], ASSUMPTIONS
    buffer = wire_bytes(shape.units, shape.sites)
    factors = 4 * RANK * shape.layers * sum(features for _, features in shape.matrices)
    lora = method == "LoRA"
    read = (2 if lora else 2 * 4) * shape.weights / devices
    joined = buffer + (factors if lora else 0)
    between = devices > known["devices_per_host"]
    speed = known["gb_per_s_between_hosts" if between else "gb_per_s_within_a_host"] * 1e9
    wire = 2 * (devices - 1) / devices * joined
    hops = 2 * np.log2(devices) * known["seconds_per_hop"] * (2 if lora else 1)
    read_s = read / fit["low_rank_bytes_per_s" if lora else "dense_bytes_per_s"]
    sums_s = fit["seconds_per_record"] + fit["seconds_per_unit"] * shape.units / devices
    host_s = 2 * buffer / known["gb_per_s_to_the_host"] / 1e9 + host * shape.units
    step_s = (4 if lora else 6) * shape.weights * known["tokens_per_device"] / known["flops"]
    trained = known["bytes_per_trained_weight"] * shape.weights / devices
    training = 2 * shape.weights / devices if lora else trained
    own = joined + (0 if lora else 4 * shape.weights / devices)
    record_s = read_s + sums_s + wire / speed + hops + host_s
    return {
        "model": name, "method": method, "devices": devices,
        "fits": bool(training + own < 0.8 * known["bytes_of_memory"]),
        "read_gb": read / 1e9, "wire_gb": wire / 1e9, "memory_gb": own / 1e9,
        "training_memory_gb": training / 1e9, "read_ms": 1e3 * (read_s + sums_s),
        "wire_ms": 1e3 * (wire / speed + hops), "host_ms": 1e3 * host_s,
        "record_ms": 1e3 * record_s, "step_ms": 1e3 * step_s,
        "percent_every_100_steps": record_s / step_s,
    }  # fmt: skip


def draw(table: pd.DataFrame) -> Figure:
    """One panel a model: what a record's time is made of, beside a training step."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(2, len(MODELS), sharex=True, sharey="row")
    kinds = {"read_ms": "reading", "wire_ms": "wire", "host_ms": "host", "step_ms": "training step"}
    colours = ["#0072B2", "#E69F00", "#009E73", "#555555"]
    for row, method in zip(panels, ("FT", "LoRA"), strict=True):
        for panel, name in zip(row, MODELS, strict=True):
            some = table[(table["model"] == name) & (table["method"] == method)]
            for (column, label), colour in zip(kinds.items(), colours, strict=True):
                style = "--" if column == "step_ms" else "-"
                fits = some[some["fits"]]
                panel.plot(some["devices"], some[column], style, color=colour, alpha=0.35)
                panel.plot(fits["devices"], fits[column], style, color=colour, label=label)
            panel.set(xscale="log", yscale="log", title=f"{name}, {method}")
            panel.set_xticks(DEVICES[::2], [str(n) for n in DEVICES[::2]], minor=False)
            panel.minorticks_off()
        row[0].set_ylabel("milliseconds")
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel("devices (faint: the training does not fit)", fontsize=9)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Computes, writes the table and the figure, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m analyses.scale")
    parser.add_argument("--quick", action="store_true", help="small timings, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in (default: .)")
    options = parser.parse_args(argv)
    shapes = [(130, 8), (7, 8)] if options.quick else MODELS["8B"].matrices
    for devices in (64, 1024):
        counted = {simulated_bytes(shapes, devices, rank) for rank in (0, devices - 1)}
        expected = wire_bytes(sum(out for out, _ in shapes), len(shapes))
        if counted != {expected}:
            raise AssertionError(f"the code sends {counted} bytes and the formula {expected}.")
    fit = fitted(pd.read_csv(MEASURED))
    host = host_seconds_per_unit(1 << (10 if options.quick else 14))
    table = pd.DataFrame(
        cost(name, method, devices, fit, host)
        for method in ("FT", "LoRA")
        for name in MODELS
        for devices in DEVICES
    )
    print(table.to_string(index=False, float_format="{:.3g}".format))
    about = fit | {"host_seconds_per_unit": host} | ASSUMPTIONS
    table = table.assign(
        model_of_cost=json.dumps(about), machine=machine(), versions=json.dumps(versions())
    )
    results = options.out / "analyses" / "results"
    results.mkdir(parents=True, exist_ok=True)
    table.to_csv(results / "scale.csv", index=False, float_format="%.6g")
    save(
        draw(table), options.out / "figures" / "scale", title="What a record costs at scale",
        alt="Reading, wire and host time of one record and the time of a training step, in "
        "milliseconds, for 8B, 70B and 405B models on 8 to 1,024 devices, FT above LoRA.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
