"""A long run: memory flat, the file linear, the work of a record constant."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from tests.conftest import campaign

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.campaign
def test_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = campaign(2_000, 100_000)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the disk is not what is tested
    written: list[int] = []
    write = os.pwrite

    def counting(descriptor: int, content: bytes, offset: int) -> int:
        written.append(len(content))
        return write(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", counting)
    torch.manual_seed(0)
    model = nn.ModuleDict({"query": nn.Linear(5, 4)})
    recorder = dd.Recorder(model, ["query"], every=1, run_dir=tmp_path / "run", run="run")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    file = tmp_path / "run" / "trajectory.csv"
    steps, held, sizes = [], [], []
    query = model["query"]
    with recorder.attach(optimizer):
        for step in range(1, records + 1):
            for parameter in query.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            if step >= records // 10 and step % (records // 10) == 0:
                del written[:]
                gc.collect()
                steps.append(step)
                held.append(sys.getallocatedblocks())
                sizes.append(file.stat().st_size)
    per_step = np.polyfit(steps, held, 1)[0]
    assert per_step < 0.5, f"{per_step:.2f} objects more a record"  # a row that stays: some 40
    growth = np.diff(sizes) / np.diff(steps)
    assert growth.max() / growth.min() < 1.1
    assert 100 < growth.mean() < 600
    assert max(written, default=0) < 1000  # one line a record, none written again
    table = dd.load_runs(tmp_path / "run")
    assert table["step"].tolist() == list(range(records + 1))
    assert recorder.trajectory.equals(table)
