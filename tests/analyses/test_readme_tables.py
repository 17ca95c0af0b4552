from __future__ import annotations

import re

import pandas as pd
import pytest

from analyses import _stored, readme_tables
from analyses.reproduce import verdict_table


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    readme_tables.main(["--check"])


def test_the_prose_says_what_the_table_does() -> None:
    text = readme_tables.README.read_text(encoding="utf-8")
    for name, words in readme_tables.STARTS.items():
        found = pd.read_csv(_stored.RESULTS / f"reproduction_{name}.csv")
        held = {
            level: int((verdict_table(found, level)["verdict"] == "holds").sum())
            for level in ("pooled", "within_step", "units")
        }
        assert held["units"] == 6
        assert held["within_step"] < 6
        counts = f"{held['pooled']} pooled, {held['within_step']} across layers and 6 across units"
        assert re.search(rf"on {words} \(\d+ layers\) {counts}", text)
    assert "every sign is that of the paper's points. Across layers fewer are certain" in text


def test_a_changed_number_is_found() -> None:
    text = readme_tables.README.read_text(encoding="utf-8")
    assert readme_tables.filled(text.replace("| +0.96 |", "| +0.97 |")) == text
    assert text.count("| +0.96 |") >= 2


def test_a_missing_block_is_said() -> None:
    with pytest.raises(ValueError, match="lacks the lines <!-- begin: finding -->"):
        readme_tables.filled("nothing")
