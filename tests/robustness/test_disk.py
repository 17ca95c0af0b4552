"""What the disk refuses: training goes on as if nobody watched, and no row is lost."""

from __future__ import annotations

import resource
import shutil
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch

import dora_dynamics as dd
from dora_dynamics.recording.baseline import Baselines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import nn

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]
    LargestFile = Callable[[int | None], None]

TARGETS = ["query", "value"]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@dataclass(frozen=True)
class Disk:
    """Where a training is recorded.

    Attributes:
        run: the run directory, which is not there yet.
        build: builds the model.
        train: trains it.
        losses: those of six steps that nobody watches.
        rows: the table of these steps where nothing goes wrong.
    """

    run: Path
    build: Build
    train: Train
    losses: list[float]
    rows: pd.DataFrame

    def watched(
        self, events: Mapping[int, Callable[[], object]], **options: Any
    ) -> tuple[dd.Recorder, list[str]]:
        """Trains as if nobody watched; after these steps, these things happen.

        Returns:
            The recorder, and what was warned of.
        """
        torch.manual_seed(0)
        model = self.build()
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=self.run, **options)
        optimizer = optimizer_of(model)

        def happen(step: int) -> None:
            if step in events:
                recorder.state_dict()  # what a thread writes is written
                events[step]()

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with recorder.attach(optimizer):
                losses = self.train(model, optimizer, 6, after_step=happen)
        assert losses == self.losses
        return recorder, [str(warning.message) for warning in caught]

    def assert_all_in_memory(self, recorder: dd.Recorder) -> None:
        pd.testing.assert_frame_equal(recorder.trajectory, self.rows, check_exact=True)

    def assert_no_row_is_lost(self, recorder: dd.Recorder) -> None:
        self.assert_all_in_memory(recorder)
        pd.testing.assert_frame_equal(dd.load_runs(self.run), self.rows, check_exact=True)


@pytest.fixture
def disk(tmp_path: Path, tiny_transformer: Build, train: Train) -> Disk:
    torch.manual_seed(0)
    model = tiny_transformer()
    losses = train(model, optimizer_of(model), 6)
    torch.manual_seed(0)
    model = tiny_transformer()
    recorder = dd.Recorder(model, TARGETS, every=1, run="run")
    optimizer = optimizer_of(model)
    with recorder.attach(optimizer):
        train(model, optimizer, 6)
    return Disk(tmp_path / "disk" / "run", tiny_transformer, train, losses, recorder.trajectory)


@pytest.fixture(params=["beside training", "in training"])
def beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a thread writes, and as on a CPU."""
    if request.param == "beside training":
        monkeypatch.setattr(Baselines, "is_on_gpu", property(lambda _: True))


@pytest.fixture
def largest_file() -> Iterator[LargestFile]:
    """Lets no file of this process grow beyond a size, as on a full disk; None ends that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit(None)


@pytest.mark.usefixtures("beside")
class TestFullDisk:
    @pytest.mark.parametrize("room", [0, 1, 700, 3000])
    def test_rows_wait_until_there_is_room(
        self, room: int, largest_file: LargestFile, disk: Disk
    ) -> None:
        run = disk.run
        held: list[int] = []

        def fill() -> None:
            largest_file((run / "trajectory.csv").stat().st_size + room)

        def empty() -> None:
            held.append(len(dd.load_runs(run)))  # as another reader sees it: whole steps
            largest_file(None)

        recorder, said = disk.watched({2: fill, 5: empty})
        assert len(said) == 1
        assert f"cannot write to {run}: File too large; training goes on" in said[0]
        assert 3 * 4 <= held[0] < 6 * 4
        assert held[0] % 4 == 0
        disk.assert_no_row_is_lost(recorder)

    def test_that_stays_full_leaves_all_rows_in_memory(
        self, largest_file: LargestFile, disk: Disk
    ) -> None:
        run = disk.run
        recorder, said = disk.watched({1: lambda: largest_file(2500)})
        assert len(said) == 1
        disk.assert_all_in_memory(recorder)
        largest_file(None)
        assert len(dd.load_runs(run)) == 2 * 4
        recorder.step += 1
        recorder.record()
        recorder.state_dict()
        assert len(dd.load_runs(run)) == 8 * 4

    def test_kept_files_are_missed_and_that_is_said(
        self, largest_file: LargestFile, disk: Disk
    ) -> None:
        run = disk.run
        events = {2: lambda: largest_file(200), 4: lambda: largest_file(None)}
        recorder, said = disk.watched(events, keep=["units", "weights"])
        assert sorted(message.split()[0] for message in said) == ["cannot", "the"]
        assert any("units and weights of step 3 could not be kept" in message for message in said)
        disk.assert_all_in_memory(recorder)
        kept = sorted(path.name for path in (run / "units").iterdir())
        assert kept == [f"step-{step}.safetensors" for step in (0, 1, 2, 5, 6)]
        assert dd.load_units(run, 5)

    def test_strict_raises(self, largest_file: LargestFile, disk: Disk) -> None:
        events = {1: lambda: largest_file(2500)}
        with pytest.raises(OSError, match="File too large"):
            disk.watched(events, strict=True)


@pytest.mark.usefixtures("beside")
class TestRemovedFolder:
    def test_is_made_again_with_all_rows(self, disk: Disk) -> None:
        run = disk.run
        recorder, said = disk.watched({3: lambda: shutil.rmtree(run)})
        assert said == [
            f"{run} was removed while it was recorded: it was made again with all its rows, "
            "without the units and weights that were kept."
        ]
        disk.assert_no_row_is_lost(recorder)
        assert sorted(path.name for path in run.iterdir()) == ["run.json", "trajectory.csv"]

    def test_is_made_again_when_it_can_be(self, disk: Disk) -> None:
        """A disk that goes and comes back: the parent is away for two steps."""
        run = disk.run
        events = {3: lambda: shutil.rmtree(run.parent), 5: run.parent.mkdir}
        recorder, said = disk.watched(events)
        assert len(said) == 1
        assert "No such file or directory; training goes on" in said[0]
        disk.assert_no_row_is_lost(recorder)

    def test_another_run_in_its_place_is_left_alone(self, disk: Disk) -> None:
        run = disk.run

        def replaced() -> None:
            shutil.rmtree(run)
            other = dd.Recorder(disk.build(), ["key"], run_dir=run, run="other")
            other.record()
            other.state_dict()  # what a thread writes is written

        recorder, said = disk.watched({3: replaced})
        assert len(said) == 1
        assert "another run was begun there; training goes on" in said[0]
        disk.assert_all_in_memory(recorder)
        assert list(dd.load_runs(run)["role"]) == ["key"] * 2

    def test_rows_outlive_a_temporary_folder(self, disk: Disk) -> None:
        run = disk.run
        recorder, said = disk.watched({})
        shutil.rmtree(run)
        assert not said
        disk.assert_all_in_memory(recorder)
        assert not run.exists()

    def test_strict_raises(self, disk: Disk) -> None:
        run = disk.run
        with pytest.raises(FileNotFoundError, match="the run directory was removed"):
            disk.watched({3: lambda: shutil.rmtree(run)}, strict=True)
