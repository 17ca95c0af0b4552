"""A run that goes on from a checkpoint has the table of an uninterrupted one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.runs.directory import RunDirectoryError
from tests.integrations.loops import adamw, step_with

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[..., nn.Module]


class TestResume:
    def run(
        self,
        model: nn.Module,
        folder: Path,
        steps: int,
        *,
        checkpoint: Any = None,
        save_at: int | None = None,
        load_first: bool = False,
        resume: Any = "state",
        **options: Any,
    ) -> Any:
        """Train up to `steps`; returns what a training script would save at `save_at`."""
        model.eval()
        if load_first:
            model.load_state_dict(checkpoint["model"])
        if resume == "state":
            resume = checkpoint["recorder"] if checkpoint else None
        recorder = dd.Recorder(
            model, ["query", "value"], every=3, run_dir=folder, run="one", resume=resume, **options
        )
        optimizer = adamw(model)
        if checkpoint is not None:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        saved = None
        with recorder.attach(optimizer):
            while recorder.step < steps:
                step_with(model, optimizer, recorder.step)
                if recorder.step == save_at:
                    saved = {
                        "model": {k: v.clone() for k, v in model.state_dict().items()},
                        "optimizer": json_like(optimizer.state_dict()),
                        "recorder": recorder.state_dict(),
                    }
        return saved

    @pytest.mark.parametrize("method", ["FT", "LoRA", "DoRA"])
    @pytest.mark.parametrize("keep", [(), ("weights", "units")])
    def test_same_table_as_an_uninterrupted_run(
        self, tiny_transformer: Build, tmp_path: Path, method: str, keep: Any
    ) -> None:
        def make() -> nn.Module:
            model = tiny_transformer()
            if method != "FT":
                source = torch.Generator().manual_seed(1)
                apply = dd.apply_lora if method == "LoRA" else dd.apply_dora
                apply(model, ["query", "value"], rank=2, generator=source)
            return model

        whole, parts = tmp_path / "whole", tmp_path / "parts"
        self.run(make(), whole, 10, keep=keep)
        saved = self.run(make(), parts, 7, save_at=5, keep=keep)
        assert sorted(dd.load_runs(parts)["step"].unique()) == [0, 3, 6, 7]
        self.run(make(), parts, 10, checkpoint=saved, keep=keep)
        assert (whole / "trajectory.csv").read_text() == (parts / "trajectory.csv").read_text()
        assert sorted(dd.load_runs(parts)["step"].unique()) == [0, 3, 6, 9, 10]
        if keep:
            pd.testing.assert_frame_equal(dd.remeasure(parts), dd.load_runs(parts), rtol=1e-6)
            for kind in keep:
                names = [{p.name for p in (f / kind).iterdir()} for f in (whole, parts)]
                assert names[0] == names[1]

    def test_step_with_rows_needs_no_state(self, tiny_transformer: Build, tmp_path: Path) -> None:
        self.run(tiny_transformer(), tmp_path / "whole", 9)
        saved = self.run(tiny_transformer(), tmp_path / "parts", 7, save_at=6)
        self.run(tiny_transformer(), tmp_path / "parts", 9, checkpoint=saved, resume=6)
        texts = [(tmp_path / n / "trajectory.csv").read_text() for n in ("whole", "parts")]
        assert texts[0] == texts[1]

    def test_decay_is_not_made_up(self, tiny_transformer: Build, tmp_path: Path) -> None:
        saved = self.run(tiny_transformer(), tmp_path / "run", 7, save_at=5)
        self.run(tiny_transformer(), tmp_path / "run", 9, checkpoint=saved, resume=5)
        table = dd.load_runs(tmp_path / "run")
        assert table.query("step <= 3")["total_decay"].notna().all()
        assert table.query("step > 5")["total_decay"].isna().all()

    def test_state_is_json(self, tiny_transformer: Build, tmp_path: Path) -> None:
        state = self.run(tiny_transformer(), tmp_path / "run", 4, save_at=4)["recorder"]
        assert json.loads(json.dumps(state)) == state

    def test_checkpoint_loaded_too_early(self, tiny_transformer: Build, tmp_path: Path) -> None:
        saved = self.run(tiny_transformer(), tmp_path / "run", 7, save_at=5)
        with pytest.raises(RunDirectoryError, match="before the checkpoint is loaded"):
            self.run(tiny_transformer(), tmp_path / "run", 9, checkpoint=saved, load_first=True)
        assert dd.load_runs(tmp_path / "run")["step"].max() == 7  # refused, and left as it was

    def test_kept_baseline_serves_a_checkpoint_loaded_early(
        self, tiny_transformer: Build, tmp_path: Path
    ) -> None:
        keep: Any = ("weights",)
        self.run(tiny_transformer(), tmp_path / "whole", 9, keep=keep)
        saved = self.run(tiny_transformer(), tmp_path / "parts", 7, save_at=5, keep=keep)
        self.run(
            tiny_transformer(), tmp_path / "parts", 9, checkpoint=saved, load_first=True, keep=keep
        )
        texts = [(tmp_path / n / "trajectory.csv").read_text() for n in ("whole", "parts")]
        assert texts[0] == texts[1]

    def test_what_does_not_fit_is_refused(self, tiny_transformer: Build, tmp_path: Path) -> None:
        self.run(tiny_transformer(), tmp_path / "run", 4)
        options: dict[str, Any] = {"run_dir": tmp_path / "run", "resume": 3}
        model = tiny_transformer()
        with pytest.raises(RunDirectoryError, match="other weights"):
            dd.Recorder(model, ["query"], **options)
        with pytest.raises(RunDirectoryError, match="axis='output'"):
            dd.Recorder(model, ["query", "value"], axis="input", **options)
        with pytest.raises(RunDirectoryError, match="there is no run directory"):
            dd.Recorder(model, ["query"], run_dir=tmp_path / "none", resume=3)
        with pytest.raises(ValueError, match="needs a run_dir"):
            dd.Recorder(model, ["query"], resume=3)
        for wrong in (-1, True, "3", {"epoch": 3}):
            bad: Any = wrong
            with pytest.raises(TypeError, match="resume"):
                dd.Recorder(model, ["query", "value"], run_dir=tmp_path / "run", resume=bad)

    def test_half_written_last_line(self, tiny_transformer: Build, tmp_path: Path) -> None:
        self.run(tiny_transformer(), tmp_path / "whole", 9)
        saved = self.run(tiny_transformer(), tmp_path / "parts", 7, save_at=6)
        with (tmp_path / "parts" / "trajectory.csv").open("a") as file:
            file.write("one,FT,9,layers.0.que")
        self.run(tiny_transformer(), tmp_path / "parts", 9, checkpoint=saved)
        texts = [(tmp_path / n / "trajectory.csv").read_text() for n in ("whole", "parts")]
        assert texts[0] == texts[1]


def json_like(state: Any) -> Any:
    """A copy of an optimizer's state that further training does not change."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: json_like(value) for key, value in state.items()}
    if isinstance(state, list):
        return [json_like(value) for value in state]
    return state
