from __future__ import annotations

import pandas as pd
import pytest

from analyses import readme_tables
from analyses.reproduce import verdict_table


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    readme_tables.main(["--check"])


def test_the_prose_counts_what_the_table_says() -> None:
    found = pd.read_csv(readme_tables.RESULTS / "reproduction_minilm.csv")
    verdicts = {
        level: verdict_table(found, level)["verdict"].tolist() for level in ("within_step", "units")
    }
    assert verdicts["units"] == ["holds"] * 6
    text = readme_tables.README.read_text(encoding="utf-8")
    number = ["none", "one", "two", "three", "four", "five", "six"]
    certain = number[verdicts["within_step"].count("holds")]
    assert f"Across layers {certain} of six are certain" in text
    assert "every sign is that of the paper's points" in text


def test_a_changed_number_is_found() -> None:
    text = readme_tables.README.read_text(encoding="utf-8")
    assert readme_tables.filled(text.replace("| +0.96 |", "| +0.97 |")) == text
    assert text.count("| +0.96 |") >= 2


def test_a_missing_block_is_said() -> None:
    with pytest.raises(ValueError, match="lacks the lines <!-- begin: finding -->"):
        readme_tables.filled("nothing")
