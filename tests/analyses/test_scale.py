from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import pytest

from analyses import scale

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_quick_run_counts_bytes_and_writes(tmp_path: Path) -> None:
    """The bytes that the code sends are those of the formula, at 64 and 1,024 processes."""
    scale.main(["--quick", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "analyses" / "results" / "scale.csv")
    assert len(table) == 2 * len(scale.MODELS) * len(scale.DEVICES)
    parts = table[["read_ms", "wire_ms", "host_ms"]].sum(axis=1)
    pd.testing.assert_series_equal(parts, table["record_ms"], check_names=False, rtol=1e-4)
    for _, some in table.groupby(["model", "method"]):
        assert some["read_gb"].is_monotonic_decreasing
    assert (tmp_path / "figures" / "scale.png").stat().st_size > 0


def test_sizes_are_those_of_the_models() -> None:
    """Linear layers alone: a little below the names, which count embeddings too."""
    billions = {name: shape.weights / 1e9 for name, shape in scale.MODELS.items()}
    assert billions == pytest.approx({"8B": 6.98, "70B": 68.5, "405B": 401}, rel=0.01)
