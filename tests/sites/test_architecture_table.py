"""The table of architectures is what the code does."""

from __future__ import annotations

import importlib.metadata

import pandas as pd
import pytest

from analyses import architecture_table

pytest.importorskip("transformers")


def test_is_up_to_date() -> None:
    written = pd.read_csv(
        architecture_table.RESULTS / architecture_table.NAME, keep_default_na=False
    )
    pd.testing.assert_frame_equal(
        architecture_table.rows(),
        written,
        obj="python -m analyses.architecture_table with transformers "
        + importlib.metadata.version("transformers"),
    )


def test_as_markdown() -> None:
    table = architecture_table.table()
    assert "| Phi-3 | – | split from `qkv_proj` | yes, grouped | (out, in) |" in table
    assert "| LLaMA, Mistral, Qwen2, Qwen3, Gemma |" in table
