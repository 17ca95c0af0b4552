"""The recorder: it changes nothing of the training it watches, and misses no step."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.runs.directory import RunDirectoryError, read_info, read_run
from dora_dynamics.sites import NoSiteMatchesError
from tests.conftest import PATIENCE
from tests.recording.training import METHODS, TARGETS, adamw, adapt, recorded_steps, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapt_first", [True, False])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_rows_are_the_change_of_the_modules_own_weights(
    method: str,
    adapt_first: bool,
    axis: Any,
    tiny_transformer: Build,
    train: Train,
    device: str,
) -> None:
    model = tiny_transformer().to(device).double()
    pretrained = copy.deepcopy(model)
    if adapt_first:
        adapt(model, method)
    recorder = dd.Recorder(model, TARGETS, every=2, axis=axis)
    if not adapt_first:
        adapt(model, method)
    optimizer = adamw(model)
    effective: dict[int, dict[str, torch.Tensor]] = {}

    def keep(step: int) -> None:
        effective[step] = {s.name: weight_of(model, s.name).clone() for s in recorder.sites}

    keep(0)
    with recorder.attach(optimizer):
        train(model, optimizer, 7, after_step=keep)
    table = recorder.trajectory
    assert recorded_steps(recorder) == [0, 2, 4, 6, 7]
    assert set(table["method"]) == set(table["run"]) == {method}
    assert len(table) == 5 * 4
    for row in table.to_dict("records"):
        before = weight_of(pretrained, row["site"])
        expected = dd.weight_change(before, effective[row["step"]][row["site"]], axis)
        for name in ("delta_magnitude", "delta_direction", "update_norm", "magnitude_before"):
            value = getattr(expected, name)
            assert row[name] == pytest.approx(value, rel=1e-8, abs=1e-14), (name, row["step"])
        assert (row["step"] == 0) == (row["update_norm"] < 1e-12)
        assert row["layer"] == int(str(row["site"]).split(".")[1])


def test_gpt2_conv1d_units_are_outputs(tiny_gpt2: Callable[[], Any]) -> None:
    for method in METHODS:
        model = tiny_gpt2()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        recorder = dd.Recorder(model, ["mlp.c_fc"], every=1)
        if method != "FT":
            {"LoRA": dd.apply_lora, "DoRA": dd.apply_dora}[method](model, ["mlp.c_fc"], rank=2)
        optimizer = adamw(model)
        tokens = torch.arange(20).view(2, 10)
        with recorder.attach(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                torch.autograd.backward(model(tokens, labels=tokens).loss)
                optimizer.step()
        last = recorder.trajectory.iloc[-1]
        assert last["units"] == 48  # 12 inputs
        name = "transformer.h.1.mlp.c_fc"
        expected = dd.weight_change(before[f"{name}.weight"].T, weight_of(model, name).T)
        assert last["delta_magnitude"] == pytest.approx(expected.delta_magnitude, rel=1e-4)
        assert last["delta_direction"] == pytest.approx(expected.delta_direction, rel=1e-3)


class TestSchedule:
    @pytest.mark.parametrize(
        ("every", "expected"),
        [
            (1, [0, 1, 2, 3, 4, 5, 6, 7]),
            (3, [0, 3, 6, 7]),
            (7, [0, 7]),
            (100, [0, 7]),
            (np.int64(3), [0, 3, 6, 7]),
            ([2, 5, 90], [0, 2, 5, 7]),
            ([], [0, 7]),
            ({7}, [0, 7]),
            (range(2, 4), [0, 2, 3, 7]),
            (np.array([1, 4]), [0, 1, 4, 7]),
            (lambda step: step in (1, 2), [0, 1, 2, 7]),
            (lambda step: np.bool_(step == 6), [0, 6, 7]),
        ],
    )
    def test_steps(
        self, every: Any, expected: list[int], tiny_transformer: Build, train: Train
    ) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"], every=every)
        optimizer = adamw(model)
        with recorder.attach(optimizer) as attached:
            assert attached is recorder
            train(model, optimizer, 7)
        assert recorder.step == 7
        assert recorded_steps(recorder) == expected
        assert not recorder.trajectory.duplicated(["step", "site"]).any()

    @pytest.mark.parametrize("every", [0, -3, True, 2.5, "10", [1.5], None])
    def test_what_is_no_schedule(self, every: Any, tiny_transformer: Build) -> None:
        with pytest.raises(ValueError, match="every must be"):
            dd.Recorder(tiny_transformer(), ["query"], every=every)

    def test_one_that_fails_costs_its_steps_and_no_training(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        def every(step: int) -> bool:
            return 1 / (step - 2) > 0

        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"], every=every)
        optimizer = adamw(model)
        said = r"at step 2 .*division by zero.*not recorded"
        with pytest.warns(UserWarning, match=said), recorder.attach(optimizer):
            train(model, optimizer, 4)
        assert recorded_steps(recorder) == [0, 3, 4]
        strict = dd.Recorder(model, ["query"], every=every, strict=True)
        with pytest.raises(ZeroDivisionError), strict.attach(optimizer):
            train(model, optimizer, 4)

    def test_attached_twice_goes_on_counting(self, tiny_transformer: Build, train: Train) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"], every=2)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
        train(model, optimizer, 2)  # nobody watches
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        assert recorded_steps(recorder) == [0, 2, 3, 4, 5]

    def test_recording_a_step_again_adds_no_row(self, tiny_transformer: Build) -> None:
        recorder = dd.Recorder(tiny_transformer(), ["query"])
        recorder.record()
        recorder.record()
        assert len(recorder.trajectory) == 2

    def test_nothing_recorded_yet_is_an_empty_table(self, tiny_transformer: Build) -> None:
        table = dd.Recorder(tiny_transformer(), ["query"]).trajectory
        assert len(table) == 0
        assert "delta_direction" in table


class TestInterruption:
    def test_exception_in_the_loop_keeps_all_rows(
        self, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, TARGETS, every=2, run_dir=tmp_path / "run")
        optimizer = adamw(model)

        def fail(step: int) -> None:
            if step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), recorder.attach(optimizer):
            train(model, optimizer, 9, after_step=fail)
        assert recorded_steps(recorder) == [0, 2, 4, 5]
        pd.testing.assert_frame_equal(
            dd.load_runs([tmp_path / "run"]), recorder.trajectory, check_exact=True
        )
        train(model, optimizer, 2)  # the hook is gone
        assert recorder.step == 5

    def test_killed_training_keeps_every_complete_row(self, tmp_path: Path) -> None:
        program = """
import sys, torch, dora_dynamics as dd
from torch import nn
model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 5))
recorder = dd.Recorder(model, ["*"], every=1, run_dir=sys.argv[1], keep="weights")
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with recorder.attach(optimizer):
    while True:
        optimizer.zero_grad()
        model(torch.randn(3, 9)).square().sum().backward()
        optimizer.step()
"""
        run = tmp_path / "run"
        process = subprocess.Popen([sys.executable, "-c", program, str(run)])
        try:
            deadline = time.monotonic() + PATIENCE
            file = run / "trajectory.csv"
            while not file.exists() or file.read_bytes().count(b"\n") < 12:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
        table = dd.load_runs([run])
        assert len(table) >= 11
        steps = table["step"].to_numpy()
        assert (np.diff(steps) >= 0).all()
        assert set(np.diff(steps)) <= {0, 1}
        assert table["delta_direction"].notna().all()
        pd.testing.assert_frame_equal(dd.remeasure(run), table, check_exact=True)

    def test_non_finite_training_is_recorded_as_such(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        model = tiny_transformer()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e38)
        recorder = dd.Recorder(model, TARGETS, every=1)
        with recorder.attach(optimizer):
            train(model, optimizer, 4)
        last = recorder.trajectory.query("step == 4")
        assert (last["non_finite"] > 0).all()
        assert last["delta_magnitude"].isna().all()


class TestRunDirectory:
    def test_holds_what_was_said_and_seen(
        self, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(
            model,
            TARGETS,
            run_dir=tmp_path / "deep" / "ft-0",
            seed=3,
            hyperparameters={"batch": 8, "note": "größe"},
        )
        adapt(model, "DoRA")
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=torch.tensor(0.01),
            betas=(0.9, 0.95),
        )
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        info = read_info(tmp_path / "deep" / "ft-0")
        assert (info.run, info.method, info.seed, info.axis) == ("ft-0", "DoRA", 3, "output")
        assert info.targets == TARGETS
        assert info.sites == [site.name for site in recorder.sites]
        assert info.model == "TinyTransformer"
        assert info.hyperparameters["note"] == "größe"
        assert info.hyperparameters["optimizer"] == "AdamW"
        group = info.hyperparameters["parameter_groups"][0]
        assert group["lr"] == pytest.approx(0.01)
        assert group["betas"] == [0.9, 0.95]
        assert torch.__version__.startswith(info.versions["torch"])
        assert set(read_run(tmp_path / "deep" / "ft-0")["method"]) == {"DoRA"}

    def test_that_holds_a_run_is_refused(self, tiny_transformer: Build, tmp_path: Path) -> None:
        model = tiny_transformer()
        first = dd.Recorder(model, TARGETS, run_dir=tmp_path, keep=["units", "weights"])
        first.record()
        kept = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        assert len(kept) == 5 + 1  # and the lock, while it is recorded
        with pytest.raises(RunDirectoryError, match=r"already holds a run: .* overwrite=True"):
            dd.Recorder(model, TARGETS, run_dir=tmp_path)
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == kept
        for left in ("weights/step-3.partial", "units/.tmpKilled"):  # by a run killed in a write
            (tmp_path / left).touch()
        dd.Recorder(model, TARGETS, run_dir=tmp_path, overwrite=True)
        assert len(read_run(tmp_path)) == 0
        del first
        files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
        assert files == {"run.json", "trajectory.csv"}

    def test_bad_arguments_leave_the_old_run_alone(
        self, tiny_transformer: Build, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        dd.Recorder(model, TARGETS, run_dir=tmp_path).record()
        bad: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"hyperparameters": {"path": tmp_path}}, TypeError, "hyperparameters must hold JSON"),
            ({"hyperparameters": {"lr": float("nan")}}, TypeError, "must hold JSON values only"),
            ({"keep": "everything"}, ValueError, r"not \['everything'\]"),
            ({"axis": "rows"}, ValueError, "axis must be 'output' or 'input', not 'rows'"),
            ({"every": 0}, ValueError, "every must be at least 1"),
        ]
        for options, error, message in bad:
            with pytest.raises(error, match=message):
                dd.Recorder(model, TARGETS, run_dir=tmp_path, overwrite=True, **options)
        with pytest.raises(NoSiteMatchesError, match=r"'nothing'.*'query' \(2, such as layers.0"):
            dd.Recorder(model, ["nothing"], run_dir=tmp_path, overwrite=True)
        assert len(read_run(tmp_path)) == 4

    def test_keep_needs_a_directory(self, tiny_transformer: Build) -> None:
        with pytest.raises(ValueError, match="needs a run_dir"):
            dd.Recorder(tiny_transformer(), TARGETS, keep="units")

    def test_json_is_plain(self, tiny_transformer: Build, tmp_path: Path) -> None:
        dd.Recorder(tiny_transformer(), TARGETS, run_dir=tmp_path)
        assert json.loads((tmp_path / "run.json").read_text())["schema_version"] == 1
