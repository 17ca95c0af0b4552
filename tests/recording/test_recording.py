"""What a recorded step waits for, and what it costs in counts."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics import measurement
from dora_dynamics._kernels import queue_dense_sums
from dora_dynamics.recording.baseline import Baselines
from dora_dynamics.recording.followed import Followed
from tests.recording.training import METHODS, TARGETS, adamw, adapt, tensors_held, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


class TestBesideTraining:
    """On a GPU a step queues its measurement and goes on; here a gate stands for the GPU."""

    @pytest.fixture
    def gate(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """Measurements end when it is set; weights are read when they are queued."""
        gate = threading.Event()
        finish = measurement.Measurement.finish

        def gated(self: measurement.Measurement) -> Any:
            assert gate.wait(60)
            return finish(self)

        monkeypatch.setattr(measurement.Measurement, "finish", gated)
        monkeypatch.setattr(Baselines, "is_on_gpu", property(lambda _: True))
        return gate

    @pytest.mark.parametrize("method", METHODS)
    def test_training_does_not_wait_and_the_rows_are_the_same(
        self,
        method: str,
        gate: threading.Event,
        tiny_transformer: Build,
        train: Train,
        seed_everything: Callable[[int], None],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seed_everything(0)
        model = adapt(tiny_transformer(), method)
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=tmp_path / "beside", run="one")
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
            assert recorder.step == 3
            assert recorder._recording.rows.are_none
            gate.set()
            recorder.state_dict()
            assert len(dd.load_runs([tmp_path / "beside"])) == 4 * 4
        monkeypatch.undo()
        seed_everything(0)
        model = adapt(tiny_transformer(), method)
        plain = dd.Recorder(model, TARGETS, every=1, run="one")
        optimizer = adamw(model)
        with plain.attach(optimizer):
            train(model, optimizer, 3)
        assert recorder.trajectory.equals(plain.trajectory)
        assert dd.load_runs([tmp_path / "beside"]).equals(plain.trajectory)

    def test_what_goes_wrong_there_is_raised_where_it_is_strict(
        self, gate: threading.Event, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        run = tmp_path / "run"
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=run, strict=True)
        optimizer = adamw(model)
        with pytest.raises(FileNotFoundError), recorder.attach(optimizer):  # noqa: PT012
            shutil.rmtree(run)
            gate.set()
            train(model, optimizer, 2)
        assert not recorder.is_attached

    def test_kept_weights_are_those_of_their_step(
        self, gate: threading.Event, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        gate.set()
        model = tiny_transformer()
        run = tmp_path / "run"
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=run, keep=["weights", "units"])
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
        assert dd.remeasure(run).equals(recorder.trajectory)


def pairs_summed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Bytes of each pair of weights, a list for every call that sums some, from now on."""
    calls: list[list[int]] = []

    def counting(pairs: list[Any], *more: Any) -> Any:
        calls.append([before.nbytes + after.nbytes for before, after in pairs])
        return queue_dense_sums(pairs, *more)

    monkeypatch.setattr(measurement, "queue_dense_sums", counting)
    return calls


class TestCounts:
    """What a recorded step costs, in counts: they hold on any machine."""

    def test_one_summing_for_all_weights(
        self, tiny_transformer: Build, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a GPU that is a launch for each layout and one transfer (tests/kernels)."""
        calls = pairs_summed(monkeypatch)
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["*.query", "*.key", "*.value", "*.out_proj"], every=2)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 6)
        assert [len(sizes) for sizes in calls] == [8] * 4

    def test_bytes_read_are_those_of_both_weights(
        self, tiny_transformer: Build, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = pairs_summed(monkeypatch)
        model = tiny_transformer()
        recorder = dd.Recorder(model, TARGETS, every=1)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 1)
        once = sum(weight_of(model, f"layers.{i}.{t}").nbytes for i in (0, 1) for t in TARGETS)
        assert [sum(sizes) for sizes in calls] == [2 * once] * 2

    @pytest.mark.parametrize("method", METHODS)
    def test_a_step_that_is_not_recorded_looks_nothing_up_again(
        self, method: str, tiny_transformer: Build, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = adapt(tiny_transformer(), method)
        recorder = dd.Recorder(model, TARGETS, every=5)
        optimizer = adamw(model)
        looked: list[str] = []
        magnitude = Followed.magnitude

        def counting(self: Followed) -> Any:
            looked.append(self.parameter)
            return magnitude(self)

        monkeypatch.setattr(Followed, "magnitude", counting)
        with recorder.attach(optimizer):
            counts = []
            for _ in range(10):
                train(model, optimizer, 1)
                counts.append(len(looked))
        assert counts == [4] * 5 + [8] * 5
        tracked = recorder.trajectory.groupby("step")["total_decay"].unique()
        monkeypatch.undo()
        assert all(len(values) == 1 for values in tracked)

    def test_a_recorder_that_is_dropped_is_gone_at_once(
        self, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        """With W_0 and its hold on the run directory, without the garbage collector."""
        model = tiny_transformer()
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=tmp_path / "run")
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 1)
        dropped = weakref.ref(recorder)
        gc.disable()
        try:
            del recorder
            assert dropped() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("method", METHODS)
    def test_tensors_held_do_not_grow_with_steps(
        self, method: str, tiny_transformer: Build, train: Train, device: str
    ) -> None:
        model = adapt(tiny_transformer().to(device), method)
        recorder = dd.Recorder(model, TARGETS, every=1)
        optimizer = adamw(model)
        held, allocated = [], []
        with recorder.attach(optimizer):
            for _ in range(3):
                train(model, optimizer, 10)
                recorder.state_dict()
                held.append(sum(tensor.nbytes for tensor in tensors_held(recorder)))
                allocated.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
        assert held[0] == held[1] == held[2]
        assert allocated[1] == allocated[2]
