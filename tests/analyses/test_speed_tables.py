"""README's "How fast": tables there or missing, and that whatever misses is named."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from analyses import speed_tables
from analyses.speed_tables import WHOLE

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = "x86_64, 2 cores, no GPU"


def test_tables_that_are_missing_are_said_to_be(tmp_path: Path) -> None:
    text = speed_tables.block(tmp_path)
    assert text.count("not measured yet") == 6
    assert "|" not in text


def test_each_miss_of_the_kernels_is_named(tmp_path: Path) -> None:
    rows = [
        ("4096×4096, fp32", "naive", 0.1, 1.0, 0.5, None),
        ("4096×4096, fp32", "numpy blocks", 0.29, 3.0, 9.0, 0.3),
        ("4096×4096, fp32", "numba", 0.61, 6.0, 18.0, 0.6),
        ("384×384, fp32", "numpy blocks", 0.2, 0.97, 2.0, None),
        ("768×768, fp32", "numpy blocks", 0.2, 1.03, 2.0, None),
        ("LLaMA-7B, bf16", "triton", 0.95, 8.0, 24.4, 0.9),
        ("LLaMA-7B, bf16", "triton, to host", 0.5, 4.0, 12.6, None),
    ]
    columns = ["case", "path", "fraction", "times_naive", "times_naive_float64", "target"]
    table = pd.DataFrame(rows, columns=columns).assign(rank=0, machine=MACHINE)
    table.to_csv(tmp_path / "performance_cpu-x86_64.csv", index=False)
    text = speed_tables.kernels(tmp_path)
    _, line = text.split("never slower than naive. ")
    assert line == (
        "Misses: 4096×4096, fp32 with numpy blocks on CPU, 2 cores (0.29); "
        "LLaMA-7B, bf16 on CPU, 2 cores (24.4 times naive in float64, asked for 25); "
        "384×384, fp32 with numpy blocks on CPU, 2 cores (0.97 times naive, asked for 1). "
        "To host it is less than that for LLaMA-7B, bf16 on CPU, 2 cores (13)."
    )
    assert "| CPU, 2 cores | 4096×4096, fp32 | numba | 0.61 | 0.60 | 6.0 | 18 |  |" in text
    assert "| CPU, 2 cores | LLaMA-7B, bf16 | triton | 0.95 | 0.90 | 8.0 | 24 | 13 |" in text
    assert "not measured yet" in speed_tables.low_rank(tmp_path)


def test_low_rank_is_held_against_the_fastest_way_to_build(tmp_path: Path) -> None:
    rows = [
        (f"{WHOLE}, rank 16", "naive", 60.0, 90.0),
        (f"{WHOLE}, rank 16", "built, then triton", 50.0, 70.0),
        (f"{WHOLE}, rank 16", "low rank", 10.0, 7.0),
        (f"{WHOLE}, rank 16", "low rank, to host", 20.0, 8.0),
        (f"{WHOLE}, rank 128", "naive", 60.0, 90.0),
        (f"{WHOLE}, rank 128", "naive, float64", 99.0, 180.0),
        (f"{WHOLE}, rank 128", "low rank", 12.5, 91.0),
        ("layer, fp32, rank 16", "naive", 40.0, 90.0),
        ("layer, fp32, rank 16", "low rank", 10.0, 7.0),
    ]
    table = pd.DataFrame(rows, columns=["case", "path", "median_ms", "extra_mb"])
    table = table.assign(rank=16, machine="x86_64, 16 cores, NVIDIA H200")
    table.to_csv(tmp_path / "performance_nvidia-h200.csv", index=False)
    text = speed_tables.low_rank(tmp_path)
    assert f"| H200 | {WHOLE}, rank 16 | 5.0 | 6.0 |  | 2.5 | 7 | 70 |" in text
    assert f"| H200 | {WHOLE}, rank 128 |  | 4.8 | 7.9 |  | 91 | 90 |" in text
    assert "| H200 | layer, fp32, rank 16 |  | 4.0 |" in text  # which is not what was asked for
    missed = f"{WHOLE}, rank 128 on H200"
    assert text.endswith(
        f"Misses: {missed} (4.8); {missed} (more memory). "
        f"To host it is less than that for {WHOLE}, rank 16 on H200 (2.5)."
    )


def test_the_observers_misses_are_named(tmp_path: Path) -> None:
    row = {"model": "MiniLM", "batch": 32, "sequence": 64, "method": "FT", "place": "device"}
    row |= {"share": 0.06, "share_low": 0.05, "share_high": 0.07, "share_every_100": 0.0012}
    row |= {"target": 0.05, "copied_mb": 42.0, "mapped_mb": 0.0, "machine": MACHINE}
    lora = row | {"method": "LoRA", "target": None, "copied_mb": 0.0}
    pd.DataFrame([row, lora]).to_csv(tmp_path / "observer_cost_cpu-x86_64.csv", index=False)
    text = speed_tables.observer(tmp_path)
    assert "| FT | on the device | 6.0% [5.0%, 7.0%] | 5.0% | 0.12% | 42 |" in text
    assert text.endswith(
        "Misses: MiniLM, 32×64 on CPU, 2 cores (6.0%); "
        "MiniLM, 32×64 on CPU, 2 cores, every 100th step (0.12%, asked for 0.1%)."
    )


def test_adapters_of_a_machine_without_peft_or_a_gpu(tmp_path: Path) -> None:
    stored = sorted(speed_tables.RESULTS.glob("adapter_cost_nvidia-*.csv"))
    table = pd.read_csv(stored[0]).assign(machine=MACHINE, peak_mb=None)
    table = table[table["by"] != "PEFT"]
    is_bert = table["model"].str.startswith("BERT")
    for variant, size in (("DoRA exact, ours", 100.0), ("DoRA detached, ours", 70.0)):
        table.loc[(table["variant"] == variant) & is_bert, "kept_mb"] = size
    table.loc[table["variant"].str.startswith("DoRA") & ~is_bert, "kept_mb"] = 100.0
    table.to_csv(tmp_path / "adapter_cost_cpu-x86_64.csv", index=False)
    text = speed_tables.adapters(tmp_path)
    assert "(kept for backward)" in text
    assert "PEFT's, ours take" not in text
    assert "kept memory by −30.0%" in text
    assert text.endswith("not reached for LLaMA-7B layer, bf16 on CPU, 2 cores.")
    shutil.copy(stored[0], tmp_path)
    assert "PEFT's, ours take: LoRA" in speed_tables.adapters(tmp_path)


@pytest.mark.parametrize(
    ("low", "again", "misses"), [(0.99, 1.0, False), (1.003, 1.002, True), (1.003, 1.004, False)]
)
def test_latency_once_merged(tmp_path: Path, low: float, again: float, misses: bool) -> None:
    common = {"model": "BERT", "machine": MACHINE}
    ours = {"variant": "DoRA, ours", "by": "ours", "merged": True, "ratio_high": 1.01}
    same = {"variant": "original again, 1", "by": "original", "merged": False, "ratio_low": 0.999}
    ours |= {"latency_ratio": 1.004, "ratio_low": low}
    same |= {"latency_ratio": 1.001, "ratio_high": again}
    table = pd.DataFrame([common | ours, common | same])
    table.to_csv(tmp_path / "adapter_cost_cpu-x86_64.csv", index=False)
    assert ("Misses: BERT on CPU, 2 cores (1.004)" in speed_tables.merged(tmp_path)) is misses


def test_growth_that_is_not_straight_is_named(tmp_path: Path) -> None:
    """On a GPU what is asked is the line of its own time; that of a call alone is told of."""
    columns = ["growth", "clock", "size", "r_squared", "exponent"]
    on_cpu = [("parameters", "alone", 1 << 20, 0.99, 0.8), ("sites", "alone", 7, 0.9991, 1.0)]
    table = pd.DataFrame(on_cpu, columns=columns).assign(machine=MACHINE)
    table.to_csv(tmp_path / "growth_cpu-x86_64.csv", index=False)
    on_gpu = [
        ("parameters", "alone", 1 << 20, 0.9, 0.8),
        ("parameters", "behind", 1 << 20, 0.999, 1.0),
        ("rank", "alone", 16, 0.999, 1.0),
        ("rank", "behind", 16, 0.91, 1.0),
        ("steps", "alone", 10, 0.92, 1.0),
    ]
    table = pd.DataFrame(on_gpu, columns=columns).assign(machine="x86_64, NVIDIA H200")
    table.to_csv(tmp_path / "growth_nvidia-h200.csv", index=False)
    text = speed_tables.growth(tmp_path)
    missed = "parameters on CPU, 2 cores (0.990); rank on H200 (0.910); recorded steps on H200"
    assert f"Misses: {missed} (0.920)." in text
    assert "(R² below that for parameters on H200 (0.900))" in text
