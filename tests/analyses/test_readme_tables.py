from __future__ import annotations

import pytest

from analyses import readme_tables


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    readme_tables.main(["--check"])


def test_a_changed_number_is_found() -> None:
    text = readme_tables.README.read_text(encoding="utf-8")
    assert readme_tables.filled(text.replace("| +0.96 |", "| +0.97 |")) == text
    assert text.count("| +0.96 |") >= 2


def test_a_missing_block_is_said() -> None:
    with pytest.raises(ValueError, match="lacks the lines <!-- begin: finding -->"):
        readme_tables.filled("nothing")
