"""One process writes into a run directory; what a killed one leaves behind stops nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch

import dora_dynamics as dd
from dora_dynamics.checkpoints import compare_checkpoints
from dora_dynamics.runs import lock as run_lock
from dora_dynamics.runs.directory import RunDirectoryError
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

HOLD = """
import sys, pathlib
from dora_dynamics.runs import lock as run_lock
keep = run_lock.hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which writes into the folder `run`."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_process_is_refused_until_the_first_is_killed(
    tmp_path: Path, other: subprocess.Popen[str], tiny_transformer: Callable[[], nn.Module]
) -> None:
    run, model = tmp_path / "run", tiny_transformer()
    refused = rf"run is being written by another process \(process {other.pid} on .*\): wait"
    for options in ({}, {"overwrite": True}):
        with pytest.raises(RunDirectoryError, match=refused):
            dd.Recorder(model, ["query"], run_dir=run, **options)  # type: ignore[arg-type]
    torch.save(tiny_transformer().state_dict(), tmp_path / "w.pt")
    with pytest.raises(RunDirectoryError, match=refused):
        compare_checkpoints(tmp_path / "w.pt", tmp_path / "w.pt", ["query"], out=run)
    assert [path.name for path in run.iterdir()] == [".lock"]
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (run / ".lock").exists()  # stale, and in nobody's way
    recorder = dd.Recorder(model, ["query"], run_dir=run)
    recorder.record()
    assert len(dd.load_runs(run)) == 2
    recorder.finish()
    assert sorted(path.name for path in run.iterdir()) == ["run.json", "trajectory.csv"]


def test_reading_needs_no_lock_and_a_finished_recorder_holds_none(
    tmp_path: Path, tiny_transformer: Callable[[], nn.Module], train: Callable[..., object]
) -> None:
    run, model = tmp_path / "run", tiny_transformer()
    recorder = dd.Recorder(model, ["query"], every=1, run_dir=run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.attach(optimizer):
        train(model, optimizer, 2)
        assert len(dd.load_runs(run)) == 3 * 2
    command = [sys.executable, "-c", HOLD, str(run)]
    assert subprocess.run(command, input="\n", text=True, capture_output=True).returncode == 0
    with recorder.attach(optimizer):  # it is taken again
        train(model, optimizer, 1)
        done = subprocess.run(command, input="\n", text=True, capture_output=True, check=False)
        assert "is being written by another process" in done.stderr
    assert len(dd.load_runs(run)) == 4 * 2


def test_a_worker_that_was_forked_neither_holds_nor_ends_the_lock(tmp_path: Path) -> None:
    give_back = run_lock.hold(tmp_path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work() -> None:
        give_back()
        try:
            run_lock.hold(tmp_path)
        except RunDirectoryError as error:
            queue.put(str(error))
        queue.close()
        queue.join_thread()
        os._exit(0)

    worker = context.Process(target=work)
    worker.start()
    assert f"process {os.getpid()} on" in queue.get(timeout=PATIENCE)
    worker.join(PATIENCE)
    assert (tmp_path / ".lock").exists()
    give_back()
    give_back()
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_locks_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        run_lock.hold(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"


def test_two_recorders_of_one_process_on_one_model(
    tmp_path: Path, tiny_transformer: Callable[[], nn.Module], train: Callable[..., list[float]]
) -> None:
    def losses(watch: bool) -> tuple[list[float], list[dd.Recorder]]:
        torch.manual_seed(0)
        model = tiny_transformer()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if not watch:
            return train(model, optimizer, 5), []
        one = dd.Recorder(model, ["query"], every=2, run_dir=tmp_path / "one", run="r")
        two = dd.Recorder(model, ["query"], every=1, run_dir=tmp_path / "two", run="r")
        with one.attach(optimizer), two.attach(optimizer):
            return train(model, optimizer, 5), [one, two]

    plain, _ = losses(watch=False)
    watched, (one, two) = losses(watch=True)
    assert plain == watched
    table = two.trajectory
    same = table[table["step"].isin([0, 2, 4, 5])].reset_index(drop=True)
    pd.testing.assert_frame_equal(one.trajectory, same, check_exact=True)


def test_a_second_recorder_takes_a_directory_over_and_the_first_writes_no_more(
    tmp_path: Path, tiny_transformer: Callable[[], nn.Module]
) -> None:
    model = tiny_transformer()
    first = dd.Recorder(model, ["query"], run_dir=tmp_path, run="first")
    first.record()
    second = dd.Recorder(model, ["value"], run_dir=tmp_path, run="second", overwrite=True)
    second.record()
    first.step += 1
    first.record()
    with pytest.warns(UserWarning, match="another run was begun there"):
        assert first.trajectory["step"].tolist() == [0, 0, 1, 1]
    assert set(dd.load_runs(tmp_path)["run"]) == {"second"}
