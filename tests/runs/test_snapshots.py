"""Kept weights and units: measured again they give the recorded table, to the last bit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import dora_dynamics as dd
from dora_dynamics.effective import LowRank
from dora_dynamics.runs.directory import RunDirectoryError, read_run
from dora_dynamics.runs.snapshots import load_baseline, load_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]

METHODS = ["FT", "LoRA", "DoRA"]


@pytest.fixture
def record(tiny_transformer: Build, train: Train, tmp_path: Path) -> Callable[..., Any]:
    """Trains a tiny model for five steps while a recorder keeps everything."""

    def run(
        method: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
    ) -> tuple[nn.Module, dd.Recorder]:
        model = tiny_transformer().to(device, dtype)
        keep: dict[str, Any] = {"keep": ["units", "weights"]} | options
        recorder = dd.Recorder(model, ["query", "value"], every=2, run_dir=tmp_path / "run", **keep)
        if method != "FT":
            apply = {"LoRA": dd.apply_lora, "DoRA": dd.apply_dora}[method]
            apply(model, ["query", "value"], rank=2)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
        with recorder.attach(optimizer):
            train(model, optimizer, 5)
        return model, recorder

    return run


@pytest.mark.parametrize("method", METHODS)
class TestRemeasure:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("axis", ["output", "input"])
    def test_equals_the_recorded_table_exactly(
        self,
        method: str,
        dtype: torch.dtype,
        axis: Any,
        record: Callable[..., Any],
        tmp_path: Path,
    ) -> None:
        _, recorder = record(method, dtype=dtype, axis=axis)
        again = dd.remeasure(tmp_path / "run")
        assert len(again) == 4 * 4
        pd.testing.assert_frame_equal(again, recorder.trajectory, check_exact=True)
        pd.testing.assert_frame_equal(again, read_run(tmp_path / "run"), check_exact=True)

    def test_weights_kept_on_a_device(
        self, method: str, device: str, record: Callable[..., Any], tmp_path: Path
    ) -> None:
        _, recorder = record(method, device=device)
        pd.testing.assert_frame_equal(
            dd.remeasure(tmp_path / "run"), recorder.trajectory, rtol=1e-5, atol=1e-7
        )

    def test_along_the_other_axis(
        self, method: str, record: Callable[..., Any], tmp_path: Path
    ) -> None:
        model, recorder = record(method)
        again = dd.remeasure(tmp_path / "run", axis="input")
        assert set(again["units"]) == {9}
        assert again["total_decay"].tolist() == recorder.trajectory["total_decay"].tolist()
        last = again.query("step == 5 and site == 'layers.1.value'")
        module = model.get_submodule("layers.1.value")
        baseline = {site.name: w for site, w in load_baseline(tmp_path / "run").items()}
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        expected = dd.weight_change(baseline["layers.1.value"], weight.detach(), "input")
        for name in ("delta_magnitude", "delta_direction", "update_norm"):
            assert last[name].item() == pytest.approx(getattr(expected, name), rel=1e-4), name

    def test_last_rows_cut_short(
        self, method: str, record: Callable[..., Any], tmp_path: Path
    ) -> None:
        record(method)
        file = tmp_path / "run" / "trajectory.csv"
        file.write_bytes(file.read_bytes()[:-100])
        again = dd.remeasure(tmp_path / "run")
        assert len(again) == 15
        pd.testing.assert_frame_equal(again, read_run(tmp_path / "run"), check_exact=True)

    def test_low_rank_methods_keep_their_factors_only(
        self, method: str, record: Callable[..., Any], tmp_path: Path
    ) -> None:
        model, _ = record(method)
        baseline = load_file(tmp_path / "run" / "weights" / "baseline.safetensors")
        assert {tuple(w.shape) for w in baseline.values()} == {(6, 9), (5, 9)}
        stored = load_file(tmp_path / "run" / "weights" / "step-5.safetensors")
        per_site = {"FT": 1, "LoRA": 2, "DoRA": 3}[method]
        assert len(stored) == per_site * 4
        assert any(tuple(w.shape) == (6, 9) for w in stored.values()) == (method == "FT")
        kept = load_weights(tmp_path / "run", 5)["layers.0.query"]
        weight = model.get_submodule("layers.0.query").weight
        assert isinstance(weight, torch.Tensor)
        if isinstance(kept, LowRank):
            base = {s.name: w for s, w in load_baseline(tmp_path / "run").items()}["layers.0.query"]
            dense = base + kept.scaling * kept.B @ kept.A
            if kept.magnitude is not None:
                dense *= (kept.magnitude / dense.norm(dim=1))[:, None]
            torch.testing.assert_close(dense, weight.detach())
        else:
            assert torch.equal(kept.weight, weight.detach())

    def test_units_reduce_to_the_rows(
        self, method: str, record: Callable[..., Any], tmp_path: Path
    ) -> None:
        _, recorder = record(method, keep="units")
        assert not (tmp_path / "run" / "weights").exists()
        for row in recorder.trajectory.to_dict("records"):
            units = dd.load_units(tmp_path / "run", row["step"])[row["site"]]
            assert len(units) == row["units"]
            for field in dataclasses.fields(units):
                assert getattr(units, field.name).dtype == np.float64
            assert np.abs(units.magnitude_difference).mean() == row["delta_magnitude"]
            assert units.one_minus_cosine.mean() == row["delta_direction"]
            assert np.sqrt(units.update_square.sum()) == row["update_norm"]


def test_weights_that_share_memory_or_are_transposed_are_kept(
    tiny_transformer: Build, train: Train, tmp_path: Path
) -> None:
    model = tiny_transformer()
    first, second = (model.get_submodule(f"layers.{i}.query") for i in (0, 1))
    transposed = torch.nn.Parameter(torch.randn(9, 6).T)
    first.weight = second.weight = transposed
    recorder = dd.Recorder(model, ["query"], every=1, run_dir=tmp_path, keep="weights")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.attach(optimizer):
        train(model, optimizer, 2)
    pd.testing.assert_frame_equal(dd.remeasure(tmp_path), recorder.trajectory, check_exact=True)


def test_gpt2_conv1d_is_remeasured(tiny_gpt2: Callable[[], Any], tmp_path: Path) -> None:
    model = tiny_gpt2()
    recorder = dd.Recorder(model, ["mlp.c_fc"], every=1, run_dir=tmp_path, keep="weights")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(20).view(2, 10)
    with recorder.attach(optimizer):
        torch.autograd.backward(model(tokens, labels=tokens).loss)
        optimizer.step()
    assert set(recorder.trajectory["units"]) == {48}
    pd.testing.assert_frame_equal(dd.remeasure(tmp_path), recorder.trajectory, check_exact=True)


def test_what_was_not_kept_is_said(record: Callable[..., Any], tmp_path: Path) -> None:
    record("FT", keep="units")
    run = tmp_path / "run"
    with pytest.raises(RunDirectoryError, match=r"does not exist: record .* keep='weights'"):
        dd.remeasure(run)
    with pytest.raises(RunDirectoryError, match=r"the run kept its units at step 0, 2, 4, 5\."):
        dd.load_units(run, 3)
    with pytest.raises(RunDirectoryError, match=r"does not exist: record .* keep='weights'"):
        load_weights(run, 2)
    with pytest.raises(ValueError, match="axis must be 'output' or 'input', not 'rows'"):
        dd.remeasure(run, axis="rows")  # type: ignore[arg-type]
    with pytest.raises(RunDirectoryError, match=r"there is no run directory"):
        dd.remeasure(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["units", "weights"])
def test_damaged_files_are_named(kind: str, record: Callable[..., Any], tmp_path: Path) -> None:
    record("LoRA")
    file = tmp_path / "run" / kind / "step-2.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    load: Callable[..., object] = {"units": dd.load_units, "weights": load_weights}[kind]
    with pytest.raises(RunDirectoryError, match=rf"{kind}.step-2\.safetensors cannot be read"):
        load(tmp_path / "run", 2)
