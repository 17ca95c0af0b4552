"""A long run: memory flat, the file linear, the work of a record constant."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from tests.conftest import campaign

if TYPE_CHECKING:
    from collections.abc import Callable

PROCESS = Path("/proc/self")
OBJECTS = 0.5
"""Python objects a record that may seem to stay; a row that stays is some 40."""
LEAK = 300
"""Bytes a record that memory may seem to grow by; one row that stays is some 2,000."""


def calls_in(action: Callable[[], object]) -> int:
    """How many functions are called, those written in C included."""
    count = 0

    def counting(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.disable()  # finalizers would come when they like
    sys.setprofile(counting)
    try:
        action()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    status = PROCESS / "statm"
    pages = int(status.read_text().split()[1]) if status.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def bytes_moved() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Bytes that this process has read, and has written, by any call; zeros where not told."""
    told = PROCESS / "io"
    if not told.exists():
        return np.zeros(2)
    lines = dict(line.split(": ") for line in told.read_text().splitlines())
    return np.array([float(lines["rchar"]), float(lines["wchar"])])


@pytest.mark.campaign
def test_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, parts = campaign(1_000, 100_000), 10
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk is not what is tested
    torch.manual_seed(0)
    model = nn.ModuleDict({"query": nn.Linear(5, 4)})
    recorder = dd.Recorder(model, ["query"], every=1, run_dir=tmp_path / "run", run="run")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    file = tmp_path / "run" / "trajectory.csv"
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held, resident, sizes, moved, spent, calls = [], [], [], [], [], []
    with recorder.attach(optimizer):
        for _ in range(parts):
            begin = time.process_time()
            for _ in range(records // parts - 1):
                optimizer.step()
            spent.append(time.process_time() - begin)
            calls.append(calls_in(optimizer.step))
            gc.collect()
            held.append(sys.getallocatedblocks())
            resident.append(resident_bytes())
            sizes.append(file.stat().st_size)
            moved.append(bytes_moved())
    steps = np.arange(1, parts + 1) * (records // parts)
    per_record = np.polyfit(steps[1:], held[1:], 1)[0]
    objects = OBJECTS * max(1, 4_000 / records)  # Python's own pools fill at the beginning
    assert per_record < objects, f"{per_record:.2f} objects more a record"
    growth = (resident[-1] - resident[1]) / (steps[-1] - steps[1])
    assert growth < LEAK * max(1, 20_000 / records), f"{growth:.0f} bytes of memory more a record"
    sizes_grow = np.diff(sizes) / np.diff(steps)
    assert sizes_grow.max() / sizes_grow.min() < 1.1
    assert 100 < sizes_grow.mean() < 600
    # what a record does is the same at the end as at the beginning
    assert max(calls[1:]) <= min(calls[1:]) + 5, calls
    read, written = np.diff(moved, axis=0).T / (records // parts)
    assert read.max() < 100, read  # the table is not read again
    assert written.max() < 1.1 * sizes_grow.max() + 100, written  # nor written again
    early, late = np.mean(spent[1:4]), np.mean(spent[-3:])
    assert late < 3 * early + 0.05, spent  # were a record as long as the table: 4 times and more
    table = dd.load_runs(tmp_path / "run")
    assert table["step"].tolist() == list(range(records + 1))
    assert recorder.trajectory.equals(table)
