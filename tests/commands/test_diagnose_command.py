"""`dora-dynamics diagnose` and the packaged reference, on recorded runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import dora_dynamics as dd
from analyses import reference_runs
from dora_dynamics.cli import main
from dora_dynamics.diagnosis.effective_rank import load_with_rank
from dora_dynamics.diagnosis.references import recorded_runs
from dora_dynamics.errors import InputError
from tests.diagnosis.kinds import diagnose

if TYPE_CHECKING:
    from pathlib import Path


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.value(torch.tanh(self.query(x)))
        return result


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of FT, LoRA and DoRA of a small network on disk, with their weights."""
    folder = tmp_path_factory.mktemp("runs")
    for decay in (0.0, 20.0):
        for method in ("FT", "LoRA", "DoRA"):
            for seed in range(2):
                torch.manual_seed(0)
                model = nn.Sequential(*(Block() for _ in range(5)))
                torch.manual_seed(seed)
                if method != "FT":
                    apply = dd.apply_lora if method == "LoRA" else dd.apply_dora
                    apply(model, ["query", "value"], rank=2)
                trained = [p for p in model.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=decay)
                recorder = dd.Recorder(
                    model,
                    ["query", "value"],
                    every=3,
                    run_dir=folder / f"decay{decay:g}" / f"{method}-seed{seed}",
                    method=method,
                    seed=seed,
                    keep="weights",
                    hyperparameters={"recipe": {"total_decay": 12 * 3e-3 * decay}},
                )
                with recorder.attach(optimizer):
                    for _ in range(12):
                        x = torch.randn(8, 16)
                        loss = (model(x) - x.flip(1)).square().mean()
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
    return folder


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["diagnose", *map(str, arguments)])
    return result.exit_code, result.output


class TestCommand:
    def test_says_what_the_function_says(self, recorded: Path) -> None:
        runs, against = recorded / "decay0", recorded / "decay0"
        code, text = call(runs / "DoRA-seed*", "--against", against / "FT*", "--against",
                          against / "LoRA*")  # fmt: skip
        assert code == 0, text
        own = sorted(map(str, runs.glob("DoRA*")))
        expected = dd.diagnose(own, sorted(map(str, runs.glob("[FL]*"))))
        assert text == f"{expected}\n"
        assert expected.table["measure"].eq("effective rank").any()

    def test_json_is_the_whole_diagnosis(self, recorded: Path) -> None:
        code, text = call(recorded / "decay20", "--method", "FT", "--json")
        assert code == 0, text
        found = json.loads(text)
        assert found["method"] == "FT"
        assert {"verdict", "confidence", "advice", "statements", "placement"} <= found.keys()
        assert {row["measure"] for row in found["table"]} >= {"r units", "decay share"}
        assert {"LoRA", "DoRA"} <= found["table"][0].keys()

    def test_table_and_the_recorded_reference(self, recorded: Path) -> None:
        code, text = call(recorded / "decay0" / "LoRA-seed0", "--table")
        assert code == 0, text
        assert "MiniLM" in text
        assert "turning share" in text
        assert call(recorded / "decay0" / "LoRA-seed0", "--alone")[0] == 0

    def test_errors_are_one_line(self, recorded: Path, tmp_path: Path) -> None:
        code, text = call(recorded / "decay0")
        assert (code, text.count("\n")) == (2, 1)
        assert "holds 3 methods (DoRA, FT, LoRA)" in text
        code, text = call(tmp_path)
        assert (code, text.count("\n")) == (2, 1)
        assert call(recorded / "decay0", "--alone", "--against", recorded)[0] == 2

    def test_effective_rank_is_that_of_lora(self, recorded: Path) -> None:
        table = load_with_rank([recorded / "decay0" / "LoRA-seed0"])
        at_end = table[table["step"] == 12]["effective_rank"]
        assert at_end.between(1 / 16, 2 / 16 + 1e-9).all()
        assert table.loc[table["step"] < 12, "effective_rank"].isna().all()


class TestReferenceRuns:
    def test_are_packaged_from_run_directories(self, recorded: Path, tmp_path: Path) -> None:
        paths = sorted(map(str, recorded.glob("*/*-seed*")))
        reference_runs.main([*paths, "--out", str(tmp_path)])
        table = pd.read_csv(tmp_path / "reference_runs.csv")
        assert table.groupby(["decays", "method"])["run"].nunique().eq(2).all()
        assert len(table) == 12 * 10 * 4
        about = json.loads((tmp_path / "reference_runs.json").read_text())
        assert len(about["runs"]) == 6
        assert all(entry["versions"]["torch"] for entry in about["runs"])
        with pytest.raises(InputError, match="without weight decay of DoRA, FT, LoRA"):
            reference_runs.main([*[p for p in paths if "decay20" in p], "--out", str(tmp_path)])

    @pytest.mark.parametrize("decays", [True, False])
    def test_packaged_ones_hold_every_method(self, decays: bool) -> None:
        table = recorded_runs(decays=decays)
        assert set(table["method"]) == {"FT", "LoRA", "DoRA"}
        assert table.groupby("method")["run"].nunique().min() >= 2
        known = table[table["method"] == "FT"]["total_decay"]
        assert known.gt(0).all() if decays else known.eq(0).all()
        assert diagnose(table, method="LoRA", reference=None).verdict == "LoRA-like"
