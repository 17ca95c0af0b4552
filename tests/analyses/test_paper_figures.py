from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import pytest

from analyses import paper_figures

if TYPE_CHECKING:
    from pathlib import Path

FILES = [f"paper_figure_{number}.{ending}" for number in (2, 5) for ending in ("png", "svg")]


def test_the_recipe_gives_the_figures_and_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper_figures.main(["--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "analyses" / "results" / "paper_figures.csv")
    panels = table.set_index(["figure", "method"])
    assert panels["pearson"].round(2).to_dict() == {
        (2, "FT"): -0.31,
        (2, "LoRA"): 0.96,
        (2, "DoRA"): -0.62,
        (5, "FT"): -0.54,
        (5, "LoRA"): 0.86,
        (5, "DoRA"): -0.95,
    }
    assert (panels["n"] == 48).all()
    assert (panels["pearson_low"] < panels["pearson"]).all()
    assert (panels["pearson"] < panels["pearson_high"]).all()
    steps = [f"r_step_{step}" for step in (1, 2, 3, 4)]
    assert panels[steps].T[(2, "DoRA")].tolist() == pytest.approx(
        [-0.97, -0.94, -0.085, -0.97], abs=0.006
    )
    assert panels[steps].T[(2, "FT")].tolist() == pytest.approx(
        [0.09, 0.01, 0.18, -0.51], abs=0.006
    )
    assert panels["text"].dropna().to_dict() == {
        (2, "FT"): -0.62,
        (2, "LoRA"): 0.83,
        (2, "DoRA"): -0.31,
    }
    printed = capsys.readouterr().out
    assert "FT and DoRA are exchanged in the text." in printed
    assert "LoRA: the text's +0.83 matches neither Figure 2 (+0.96) nor Figure 5 (+0.86)" in printed

    again = tmp_path / "again"
    paper_figures.main(["--out", str(again)])
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == FILES
    for name in FILES:
        first, second = (folder / "figures" / name for folder in (tmp_path, again))
        assert first.read_bytes() == second.read_bytes()
