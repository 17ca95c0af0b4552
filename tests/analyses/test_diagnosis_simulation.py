"""The simulation of the diagnosis, at its smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analyses import diagnosis_simulation
from analyses.synthetic_runs import KINDS, Design

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_simulation_writes_its_table_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis_simulation, "LAYERS", (6,))
    diagnosis_simulation.main(["--draws", "1", "--resamples", "100", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "analyses" / "results" / "diagnosis_simulation.csv")
    assert len(table) == 4 * 3
    assert table["right"].mean() > 0.9
    assert (tmp_path / "figures" / "diagnosis_simulation.svg").exists()


def test_designs_are_drawn_in_their_range() -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        designs = [Design.drawn(kind, rng) for _ in range(20)]
        assert len({design.size for design in designs}) == 20
        decaying = kind in ("decay", "own magnitude")
        assert all(decaying or design.total_decay == 0 for design in designs)
