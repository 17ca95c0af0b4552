from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from analyses import performance

if TYPE_CHECKING:
    from pathlib import Path


def test_quick_run_writes_table_and_figure(tmp_path: Path) -> None:
    performance.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    (path,) = (tmp_path / "analyses" / "results").glob("performance_*.csv")
    table = pd.read_csv(path)
    dense = table[table["rank"] == 0]
    assert {"naive", "naive, float64", "read", "numpy blocks"} <= set(dense["path"])
    assert "low rank" in set(table["path"])
    assert (table["median_ms"] > 0).all()
    assert (table["relative_error"].dropna() < 1e-6).all()
    assert (tmp_path / "figures" / "performance.png").stat().st_size > 0
    assert (tmp_path / "figures" / "performance.svg").stat().st_size > 0

    drawn = (tmp_path / "figures" / "performance.svg").read_bytes()
    performance.main(["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "figures" / "performance.svg").read_bytes() == drawn
