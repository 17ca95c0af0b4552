"""The run directory of a comparison: the recorder's own, resumable, never half-written."""

from __future__ import annotations

import resource
import threading
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import safetensors.torch
import torch

import dora_dynamics as dd
from dora_dynamics._kernels import threads
from dora_dynamics.checkpoints import CheckpointError, compare, compare_checkpoints, updates
from dora_dynamics.runs import directory as run_directory
from dora_dynamics.runs.directory import RunDirectoryError, load_runs, read_info

from .models import bert, state

if TYPE_CHECKING:
    from pathlib import Path

STEPS = (10, 20, 30)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A base and three checkpoints of two layers, as safetensors files."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qv"]
    weights = {name: torch.randn(8, 6, generator=generator) for name in names}
    safetensors.torch.save_file(weights, tmp_path / "base.safetensors")
    (tmp_path / "run").mkdir()
    for step in STEPS:
        weights = {n: t + 0.1 * torch.randn(8, 6, generator=generator) for n, t in weights.items()}
        safetensors.torch.save_file(weights, tmp_path / "run" / f"step-{step}.safetensors")
    return tmp_path


def run(files: Path, **options: Any) -> pd.DataFrame:
    arguments = {"out": files / "out", **options}
    return compare_checkpoints(files / "base.safetensors", files / "run", ["query"], **arguments)


def test_the_run_directory_is_the_recorders(files: Path) -> None:
    table = run(files)
    pd.testing.assert_frame_equal(load_runs([files / "out"]), table, check_exact=True)
    info = read_info(files / "out")
    assert (info.run, info.method, info.axis) == ("out", "FT", "output")
    assert info.sites == [f"layers.{i}.self_attn.q_proj" for i in range(2)]
    assert [c["step"] for c in info.hyperparameters["checkpoints"]] == list(STEPS)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        run(files)
    pd.testing.assert_frame_equal(run(files, overwrite=True), table)


def test_the_same_rows_as_a_recorder_takes(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "base")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = dd.Recorder(model, targets=["query", "value"], every=1, method="FT", run="x")
    with recorder.attach(optimizer):
        for step in (1, 2):
            optimizer.zero_grad()
            model(torch.arange(8).view(1, 8)).last_hidden_state[:, :, :9].square().sum().backward()
            optimizer.step()
            model.save_pretrained(tmp_path / f"checkpoint-{step}")
    recorded = recorder.trajectory
    table = compare_checkpoints(
        tmp_path / "base", str(tmp_path / "checkpoint-*"), ["query", "value"], run="x"
    )
    recorded = recorded[recorded["step"] > 0].drop(columns="total_decay")
    keys = ["step", "site"]
    pd.testing.assert_frame_equal(
        table.drop(columns="total_decay").sort_values(keys, ignore_index=True),
        recorded.sort_values(keys, ignore_index=True),
        check_exact=True,
    )
    assert state(model)


@pytest.mark.parametrize("completed", [0, 1, 2])
def test_an_interrupted_run_resumes_to_the_same_table(
    files: Path, completed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(files, out=files / "whole", run="r")
    measure, count = compare._measure, 0

    def stop(*arguments: Any) -> Any:
        nonlocal count
        if count == completed:
            raise KeyboardInterrupt
        count += 1
        return measure(*arguments)

    monkeypatch.setattr(compare, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run(files, run="r")
    monkeypatch.setattr(compare, "_measure", measure)
    assert (files / "out").exists() == (completed > 0)
    if completed:
        assert len(load_runs([files / "out"])) == 2 * completed
        with (files / "out" / "trajectory.csv").open("a") as file:
            file.write("r,FT,30,layers.0.self")  # killed in the middle of a line
    resumed = run(files, run="r", resume=True)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert _text(files / "out") == _text(files / "whole")


def _text(folder: Path) -> bytes:
    return (folder / "trajectory.csv").read_bytes()


def test_resume_measures_again_what_is_incomplete(files: Path) -> None:
    whole = run(files, run="r")
    lines = _text(files / "out").splitlines(keepends=True)
    (files / "out" / "trajectory.csv").write_bytes(b"".join(lines[:4]))  # step 20 lacks a row
    pd.testing.assert_frame_equal(run(files, run="r", resume=True), whole, check_exact=True)
    assert _text(files / "out").splitlines(keepends=True) == lines


def test_resume_refuses_another_comparison(files: Path) -> None:
    run(files, run="r")
    for change in ({"axis": "input"}, {"method": "other"}, {"run": "s"}):
        with pytest.raises(CheckpointError, match="another comparison"):
            run(files, **{"run": "r", **change}, resume=True)
    (files / "copy.safetensors").write_bytes((files / "base.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="resume with the same one"):
        compare_checkpoints(
            files / "copy.safetensors", files / "run", ["query"], out=files / "out", run="r",
            resume=True,
        )  # fmt: skip


@pytest.mark.parametrize("rows", [0, 3])
def test_a_full_disk_leaves_whole_checkpoints_or_nothing(files: Path, rows: int) -> None:
    whole = run(files, out=files / "whole", run="r")
    size = len(b"".join(_text(files / "whole").splitlines(keepends=True)[: 1 + rows]))
    info = (files / "whole" / "run.json").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size + 9, info + 1 if rows else 0), limits[1]))
    try:
        with pytest.raises((CheckpointError, RunDirectoryError), match="cannot write to"):
            run(files, run="r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = len(load_runs([files / "out"])) if (files / "out").exists() else 0
    assert kept % 2 == 0
    assert (kept > 0) == (rows > 0) or info > size
    if kept:
        pd.testing.assert_frame_equal(run(files, run="r", resume=True), whole, check_exact=True)
    else:
        assert not (files / "out").exists()


def test_a_comparison_that_fails_leaves_the_run_it_was_to_replace(files: Path) -> None:
    before = run(files)
    weights = safetensors.torch.load_file(files / "base.safetensors")
    name = "layers.1.self_attn.q_proj.weight"
    for bad, said in ((weights[name] * float("nan"), "NaN"), (weights[name][:3], "shape")):
        safetensors.torch.save_file(weights | {name: bad.clone()}, files / "bad.safetensors")
        with pytest.raises(CheckpointError, match=said):
            compare_checkpoints(
                files / "base.safetensors",
                files / "bad.safetensors",
                ["query"],
                out=files / "out",
                overwrite=True,
            )
        pd.testing.assert_frame_equal(load_runs([files / "out"]), before, check_exact=True)
    run(files, overwrite=True, run="again")
    assert set(load_runs([files / "out"])["run"]) == {"again"}


def test_a_folder_that_cannot_be_written(files: Path) -> None:
    (files / "file").write_text("in the way")
    for path in (files / "file", files / "file" / "out"):
        with pytest.raises(RunDirectoryError, match=r"cannot write to .*it is no folder"):
            run(files, out=path)
    with pytest.raises((CheckpointError, RunDirectoryError), match="cannot write to"):
        run(files, out="/proc/nowhere/out")


def test_a_damaged_checkpoint_is_found_before_anything_is_written(files: Path) -> None:
    last = files / "run" / "step-30.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        run(files)
    assert not (files / "out").exists()


def test_jobs_and_progress(files: Path) -> None:
    seen: list[tuple[int, int]] = []
    one = run(files, jobs=1, out=None, progress=lambda done, total: seen.append((done, total)))
    assert sum(done for done, _ in seen) == seen[0][1] == 3 * 2 * 2 * 8 * 6 * 4
    pd.testing.assert_frame_equal(run(files, jobs=3, out=None), one, check_exact=True)
    pd.testing.assert_frame_equal(run(files, out=None), one, check_exact=True)
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        run(files, jobs=0)
    with pytest.raises(ValueError, match="axis must be"):
        run(files, axis="sideways")


@pytest.mark.parametrize(("sites", "jobs", "within"), [(1, 6, 6), (2, 6, 3), (2, 1, 1)])
def test_jobs_are_threads(
    files: Path, sites: int, jobs: int, within: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights at once, and the rest of the threads within each of them; torch's own put aside."""
    meeting, seen, change_of = threading.Barrier(min(sites, jobs)), set(), updates.change_of

    def meet(*arguments: Any) -> Any:
        meeting.wait(30)
        seen.add((threads._limit.get(), torch.get_num_threads()))
        return change_of(*arguments)

    monkeypatch.setattr(compare, "change_of", meet)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        targets = ["*layers.0*q_proj", "*layers.1*q_proj"][:sites]
        compare_checkpoints(files / "base.safetensors", files / "run", targets, jobs=jobs)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {(within, 1)}


def test_rows_are_appended_by_the_run_directorys_own_writer(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes only a part of the rows without an error is noticed, too."""

    def half(directory: Path, rows: Any) -> None:
        with (directory / "trajectory.csv").open("a") as file:
            file.write("half of a row")

    monkeypatch.setattr(run_directory, "append_rows", half)
    with pytest.raises(CheckpointError, match="took only a part"):
        run(files)
    assert not (files / "out").exists()
