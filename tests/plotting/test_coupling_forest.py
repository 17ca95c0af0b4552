from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dora_dynamics.plotting import coupling_forest
from dora_dynamics.statistics import coupling
from tests.plotting.plotting_tables import trajectory


def table() -> pd.DataFrame:
    rows = trajectory(["LoRA", "FT", "DoRA"], roles=["query", "value"])
    return pd.concat(
        [
            coupling(rows, by=["method", "role"], level=level, permutations=0)
            for level in ("pooled", "within_step")
        ],
        ignore_index=True,
    )


def test_a_dot_and_an_interval_for_every_row() -> None:
    couplings = table()
    figure = coupling_forest(couplings)
    assert [axes.get_title() for axes in figure.axes] == ["query", "value"]
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks == ["FT", "LoRA", "DoRA"]
    for axes, role in zip(figure.axes, ("query", "value"), strict=True):
        bars, dots = axes.collections[::2], axes.collections[1::2]
        for level, bar, dot in zip(("pooled", "within_step"), bars, dots, strict=True):
            mine = couplings[(couplings["role"] == role) & (couplings["level"] == level)]
            at = np.asarray(dot.get_offsets())
            np.testing.assert_array_equal(at[:, 0], mine["pearson"])
            assert [round(place) for place in at[:, 1]] == [1, 0, 2]
            ends = np.array([segment[:, 0] for segment in bar.get_segments()])  # type: ignore[attr-defined]
            np.testing.assert_array_equal(ends, mine[["pearson_low", "pearson_high"]])


def test_zero_line_range_and_legend() -> None:
    (query, _) = (figure := coupling_forest(table(), title="all")).axes
    assert np.asarray(query.lines[0].get_xdata()).tolist() == [0, 0]
    assert query.get_xlim() == (-1.05, 1.05)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pooled", "within step"]


def test_published_values_are_hollow_diamonds() -> None:
    couplings = table()
    couplings["paper"] = np.where(couplings["role"] == "query", 0.25, np.nan)
    figure = coupling_forest(couplings)
    diamonds = figure.axes[0].collections[2]
    assert np.asarray(diamonds.get_offsets())[:, 0].tolist() == [0.25] * 3
    assert len(diamonds.get_facecolor()) == 0
    assert figure.legends[0].get_texts()[-1].get_text() == "paper"


def test_a_coupling_without_role_or_interval_is_drawn() -> None:
    couplings = coupling(trajectory(["FT"]).iloc[:2], by="method", level="pooled")
    (axes,) = coupling_forest(couplings).axes
    assert axes.get_title() == ""


def test_ambiguous_rows_are_refused() -> None:
    couplings = table()
    with pytest.raises(ValueError, match="several rows for LoRA, query, pooled"):
        coupling_forest(pd.concat([couplings, couplings]))
    with pytest.raises(ValueError, match="no column 'pearson_low'"):
        coupling_forest(couplings.drop(columns="pearson_low"))
    with pytest.raises(ValueError, match="no rows"):
        coupling_forest(couplings.iloc[:0])
