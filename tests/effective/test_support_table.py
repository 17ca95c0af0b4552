"""The table of supported PEFT methods is what the code does."""

from __future__ import annotations

import importlib.metadata

import pandas as pd
import pytest

from analyses import support_table


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
def test_is_up_to_date() -> None:
    pytest.importorskip("peft", "0.21", reason="the table is of a newer PEFT")
    pytest.importorskip("bitsandbytes", reason="the table has LoftQ, which needs it")
    pytest.importorskip("sklearn", reason="the table has AdaMSS, which needs it")
    written = pd.read_csv(support_table.RESULTS / support_table.NAME, keep_default_na=False)
    pd.testing.assert_frame_equal(
        support_table.rows(),
        written,
        obj=f"python -m analyses.support_table with peft {importlib.metadata.version('peft')}",
    )


def test_as_markdown() -> None:
    table = support_table.table()
    assert "| OFT | coft, shared, exact | merge on a copy |" in table
    assert "direct; `baseline=` needed" in table
    assert "refused: it trains prompts" in table
