from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from analyses import checkpoint_performance as recipe
from tests.conftest import campaign

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.campaign
def test_gigabytes_in_bounded_memory_and_only_the_chosen_bytes(tmp_path: Path) -> None:
    """Eight threads, that each have buffers of their own; a pair of 3 GB in the campaign."""
    gigabytes = campaign(1, 3)
    how = ["--gigabytes", f"{gigabytes}", "--rounds", "1", "--jobs", "8"]
    recipe.main([*how, "--folder", str(tmp_path), "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "analyses" / "results" / "checkpoint_performance.csv")
    whole = table[(table["weights"] == "all") & (table["path"] != "cat")].set_index("path")
    assert (whole["mb"] > 930 * gigabytes).all()
    assert list(whole["chosen_mb"]) == pytest.approx(list(whole["mb"]), rel=1e-4)
    assert (whole["anonymous_mb"] > 0).all()
    assert (whole["anonymous_mb"] < recipe.MEMORY_TARGET).all()
    assert (whole["ratio"] > 0).all()
    assert whole["target"].to_dict().items() <= recipe.TARGETS.items()
    one = table[table["weights"] == "one"].iloc[0]
    assert one["chosen_mb"] == pytest.approx(2 * 2 * np.prod(recipe.SHAPE) / 1e6, rel=1e-4)
    if not one[["read_mb", "read_ahead_mb"]].isna().any():
        assert one["read_mb"] <= one["chosen_mb"] + 2 * 3 * one["read_ahead_mb"]
        assert one["read_mb"] < 0.2 * one["mb"]
    assert not list(tmp_path.glob("*/*.safetensors"))
