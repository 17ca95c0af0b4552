"""Killed at any moment: complete rows are kept, and resuming gives the uninterrupted table."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import dora_dynamics as dd
from dora_dynamics.runs.directory import RunDirectoryError, create_run
from tests.conftest import campaign, without_gpu

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn


@pytest.mark.campaign
def test_resuming_gives_the_table_of_an_uninterrupted_run(tmp_path: Path) -> None:
    kills = campaign(4, 100)
    command = [sys.executable, "-m", "tests.robustness.killed", str(tmp_path), str(kills), "0"]
    done = subprocess.run(
        command, env=without_gpu(), capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["kills"]
    assert sum(counts.values()) >= kills
    assert all(counts.values()) or kills < 100


def test_a_step_that_was_half_written_is_recorded_again(
    tmp_path: Path, tiny_transformer: Callable[[], nn.Module], train: Callable[..., object]
) -> None:
    """The checkpoint of step 4 was saved, and the process killed among the rows of step 4."""
    torch.manual_seed(0)
    model = tiny_transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = dd.Recorder(model, ["query", "value"], every=2, run_dir=tmp_path / "run")
    with recorder.attach(optimizer):
        train(model, optimizer, 4)
    expected = dd.load_runs(tmp_path / "run")
    file = tmp_path / "run" / "trajectory.csv"
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in (b"", lines[-4], b"".join(lines[-4:-1]), b"".join(lines[-4:])[:-1]):
        file.write_bytes(b"".join(lines[:-4]) + cut)
        fresh = tiny_transformer()
        again = dd.Recorder(fresh, ["query", "value"], every=2, run_dir=tmp_path / "run", resume=4)
        fresh.load_state_dict(model.state_dict())
        with again.attach(torch.optim.SGD(fresh.parameters(), lr=0.1)):
            pass
        table = dd.load_runs(tmp_path / "run")
        assert table["step"].tolist() == expected["step"].tolist()
        for name in ("delta_magnitude", "delta_direction", "update_norm"):
            assert table[name].tolist() == expected[name].tolist()


@pytest.mark.parametrize("left", [b"", b"run,meth", b"header"])
def test_a_folder_whose_making_was_killed_can_be_used(tmp_path: Path, left: bytes) -> None:
    create_run(tmp_path / "run")
    file = tmp_path / "run" / "trajectory.csv"
    if left != b"header":
        file.write_bytes(left)
    create_run(tmp_path / "run")
    file.write_bytes(file.read_bytes() + b"a row\n")
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        create_run(tmp_path / "run")
