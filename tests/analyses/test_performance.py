from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def test_every_way_of_a_case_is_a_bar() -> None:
    """As long as its fraction of bandwidth, whatever the order of the rows."""
    ways = [("b", "numba", 1.1, 0.6), ("a", "naive", 0.1, None), ("b", "naive", 0.2, None)]
    ways += [("a", "numpy blocks", 0.4, 0.3), ("b", "numpy blocks", 0.5, 0.3)]
    table = pd.DataFrame(ways, columns=["case", "path", "fraction", "target"])
    table = table.assign(spread=0.05, times_naive_float64=9.0, machine="here")
    (panel,) = performance.draw([table]).axes
    drawn: Any = panel.patches
    bars = {bar.get_y(): bar.get_width() for bar in drawn}
    assert [bars[y] for y in sorted(bars)] == [0.2, 0.5, 1.1, 0.1, 0.4]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["b", "a"]
