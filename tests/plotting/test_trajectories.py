from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from dora_dynamics.plotting import trajectories
from dora_dynamics.plotting._style import LAYER_COLOURS
from tests.plotting.plotting_tables import trajectory


def test_one_line_per_weight_with_its_values() -> None:
    table = trajectory()
    figure = trajectories(table, "signed_delta_magnitude")
    assert [axes.get_title() for axes in figure.axes] == ["FT, query", "LoRA, query", "DoRA, query"]
    lines = figure.axes[1].lines
    assert len(lines) == 12
    mine = table[table["method"] == "LoRA"].groupby("site", sort=False)
    for line, (_, rows) in zip(lines, mine, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), rows["step"])
        np.testing.assert_array_equal(line.get_ydata(), rows["signed_delta_magnitude"])
        assert to_hex(line.get_color()).upper() == LAYER_COLOURS[rows["layer"].iloc[0]]
        assert line.get_linestyle() == ("-" if rows["stack"].iloc[0] == "encoder" else "--")


def test_labels_and_legends() -> None:
    figure = trajectories(trajectory(), "delta_direction", title="all")
    assert figure.axes[0].get_ylabel() == "ΔD (mean over output units)"
    assert figure.axes[0].get_xlabel() == "step"
    names = {
        one.get_title().get_text(): [text.get_text() for text in one.get_texts()]
        for one in figure.legends
    }
    assert names == {"layer": list("012345"), "stack": ["encoder", "decoder"]}


def test_steps_are_whole_numbers() -> None:
    table = trajectory(["FT"], stacks=[""])
    table["step"] = 10 * table["step"] // table["step"].max()
    (axes,) = trajectories(table, "delta_direction").axes
    assert len(axes.get_xticks()) > 1
    assert (axes.get_xticks() % 1 == 0).all()


def test_a_gap_where_a_value_is_missing_and_a_line_per_run_and_head() -> None:
    table = trajectory(["FT"], layers=2, runs=2, stacks=[""])
    table = pd.concat([table.assign(head=head) for head in (0, 1)], ignore_index=True)
    table.loc[2, "delta_direction"] = np.nan
    (axes,) = trajectories(table, "delta_direction").axes
    assert len(axes.lines) == 2 * 2 * 2
    drawn = np.array([line.get_ydata() for line in axes.lines], dtype=float)
    assert np.isnan(drawn).sum() == 1


def test_a_method_whose_role_is_nowhere_finite_has_no_panel() -> None:
    table = trajectory(["FT", "LoRA"], roles=["query", "value"])
    lost = (table["method"] == "LoRA") & (table["role"] == "value")
    table.loc[lost, "delta_direction"] = np.nan
    titles = [axes.get_title() for axes in trajectories(table, "delta_direction").axes]
    assert titles == ["FT, query", "LoRA, query", "FT, value"]
    by_role = trajectories(table[table["method"] == "LoRA"], "delta_direction", by="role")
    assert [axes.get_title() for axes in by_role.axes] == ["query"]


def test_forty_layers_and_unknown_measures() -> None:
    figure = trajectories(trajectory(["FT"], layers=40, stacks=[""]), "delta_magnitude")
    assert figure.axes[-1].get_ylabel() == "layer"
    assert not figure.legends
    with pytest.raises(ValueError, match="measure 'loss' is unknown"):
        trajectories(trajectory(), "loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no column 'relative_delta_magnitude'"):
        trajectories(trajectory(), "relative_delta_magnitude")
