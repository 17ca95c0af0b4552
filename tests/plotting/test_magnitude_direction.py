from __future__ import annotations

import io
import re
import sys
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from dora_dynamics.plotting import magnitude_direction
from dora_dynamics.plotting._style import (
    FINAL_MARKER,
    INTERMEDIATE_MARKERS,
    LAYER_COLOURS,
    NO_LAYER_COLOUR,
)
from dora_dynamics.statistics import coupling
from tests.plotting.plotting_tables import trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection
    from matplotlib.legend import Legend
    from matplotlib.path import Path

    from dora_dynamics.plotting._style import StyleName


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def offsets(axes: Axes) -> np.ndarray:
    found = [np.asarray(points.get_offsets()) for points in axes.collections]
    return np.concatenate(found) if found else np.empty((0, 2))


def vertices(path: Path) -> np.ndarray:
    return np.asarray(path.vertices)


def colours(points: Collection) -> list[str]:
    return [to_hex(tuple(colour)) for colour in np.asarray(points.get_facecolor())]


def legend(figure: Figure, title: str) -> Legend:
    (found,) = [one for one in figure.legends if one.get_title().get_text() == title]
    return found


def entries(figure: Figure, title: str) -> list[str]:
    return [text.get_text() for text in legend(figure, title).get_texts()]


def rows_of(table: pd.DataFrame, method: str, role: str = "query") -> pd.DataFrame:
    return table[(table["method"] == method) & (table["role"] == role) & (table["step"] > 0)]


def test_panels_come_in_the_order_of_the_paper_then_of_the_table() -> None:
    figure = magnitude_direction(trajectory(["VeRA", "DoRA", "AdaLoRA", "FT", "LoRA"]))
    titles = [axes.get_title() for axes in panels(figure)]
    assert titles == [f"{name}, query" for name in ("FT", "LoRA", "DoRA", "VeRA", "AdaLoRA")]


def test_every_row_after_step_0_is_one_point_at_its_place() -> None:
    table = trajectory()
    for axes, method in zip(
        panels(magnitude_direction(table)), ("FT", "LoRA", "DoRA"), strict=True
    ):
        expected = rows_of(table, method)[["delta_direction", "delta_magnitude"]].to_numpy()
        drawn = offsets(axes)
        assert len(drawn) == 48
        np.testing.assert_allclose(
            drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)], rtol=0, atol=0
        )


def test_colours_are_layers_and_markers_are_checkpoints() -> None:
    table = trajectory(["FT"])
    (axes,) = panels(magnitude_direction(table))
    markers = (*INTERMEDIATE_MARKERS, FINAL_MARKER)
    assert len(axes.collections) == 4
    for points, marker, step in zip(axes.collections, markers, (100, 200, 300, 400), strict=True):
        shape = MarkerStyle(marker)
        path = shape.get_path().transformed(shape.get_transform())
        np.testing.assert_allclose(vertices(points.get_paths()[0]), vertices(path))
        part = table[table["step"] == step]
        expected = [LAYER_COLOURS[layer] for layer in part["layer"]]
        assert [colour.upper() for colour in colours(points)] == expected
        np.testing.assert_array_equal(np.asarray(points.get_offsets())[:, 0], part.delta_direction)


@pytest.mark.parametrize("signed", [False, True])
def test_the_line_is_the_least_squares_line(signed: bool) -> None:
    table = trajectory()
    measure = "signed_delta_magnitude" if signed else "delta_magnitude"
    for axes, method in zip(
        panels(magnitude_direction(table, signed=signed)), ("FT", "LoRA", "DoRA"), strict=True
    ):
        rows = rows_of(table, method)
        slope, intercept = np.polyfit(rows["delta_direction"], rows[measure], 1)
        (line,) = axes.lines
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        np.testing.assert_allclose(y, intercept + slope * x, rtol=1e-9)
        assert x.tolist() == [rows["delta_direction"].min(), rows["delta_direction"].max()]


def test_the_statistic_is_printed_above_all_points_and_the_line() -> None:
    table = trajectory()
    statistics = coupling(table, by=["method", "role"], level="pooled").set_index("method")
    figure = magnitude_direction(table)
    figure.draw_without_rendering()
    for axes, method in zip(panels(figure), ("FT", "LoRA", "DoRA"), strict=True):
        (text,) = axes.texts
        r, low, high, slope, n = (
            float(number.replace("−", "-"))
            for number in re.findall(r"[+−]?\d+(?:\.\d+)?", text.get_text())
        )
        row = statistics.loc[method]
        expected = [row[name] for name in ("pearson", "pearson_low", "pearson_high", "slope", "n")]
        assert [r, low, high, slope, n] == pytest.approx(expected, abs=0.005)
        bottom = text.get_window_extent().y0
        assert axes.transData.transform(offsets(axes))[:, 1].max() < bottom
        assert axes.transData.transform(axes.lines[0].get_xydata())[:, 1].max() < bottom


def test_a_given_coupling_is_what_is_printed() -> None:
    table = trajectory(["FT"])
    given = pd.DataFrame(
        {"method": ["FT"], "role": ["query"], "level": ["pooled"]}
        | {"n": [7], "pearson": [-0.125], "slope": [-2.0e-5]}
    )
    (axes,) = panels(magnitude_direction(table, coupling=given))
    assert axes.texts[0].get_text() == "r = −0.12\nslope −2.00e−05, n = 7"
    with pytest.raises(ValueError, match="one pooled row for 'FT, query'"):
        magnitude_direction(table, coupling=given.assign(level="units"))
    with pytest.raises(ValueError, match="signed=True"):
        magnitude_direction(table, coupling=given.assign(signed=False), signed=True)
    with pytest.raises(ValueError, match="coupling has no column 'slope'"):
        magnitude_direction(table, coupling=given.drop(columns="slope"))


def test_axes_say_what_they_show_once() -> None:
    first, second, third = panels(magnitude_direction(trajectory()))
    assert first.get_ylabel() == "ΔM (mean over output units)"
    assert {axes.get_xlabel() for axes in (first, second, third)} == {"ΔD (mean over output units)"}
    assert second.get_ylabel() == third.get_ylabel() == ""
    table = trajectory(["FT"])
    table.attrs["axis"] = "input"
    (axes,) = panels(magnitude_direction(table, signed=True))
    assert axes.get_ylabel() == "signed ΔM (mean over input units)"


def test_legends_name_layers_and_steps_and_hide_no_panel() -> None:
    figure = magnitude_direction(trajectory())
    figure.draw_without_rendering()
    assert entries(figure, "layer") == ["0", "1", "2", "3", "4", "5"]
    assert entries(figure, "checkpoint") == ["step 100", "step 200", "step 300", "final, step 400"]
    boxes = [one.get_window_extent() for one in figure.legends]
    assert not boxes[0].overlaps(boxes[1])
    assert not any(axes.get_window_extent().overlaps(box) for axes in figure.axes for box in boxes)


def test_checkpoints_are_counted_where_runs_have_different_steps() -> None:
    table = pd.concat([trajectory(["FT"]), trajectory(["LoRA"], steps=(10, 20, 30, 35))])
    figure = magnitude_direction(table)
    assert entries(figure, "checkpoint") == [
        "intermediate 1",
        "intermediate 2",
        "intermediate 3",
        "final",
    ]
    assert [len(axes.collections) for axes in panels(figure)] == [4, 4]


def test_many_steps_are_drawn_in_thirds_and_the_final_one() -> None:
    table = trajectory(["FT"], steps=range(0, 1001, 100), stacks=[""])
    figure = magnitude_direction(table)
    (axes,) = panels(figure)
    assert [len(np.asarray(points.get_offsets())) for points in axes.collections] == [18, 18, 18, 6]
    assert entries(figure, "checkpoint") == [
        "steps 100–300",
        "steps 400–600",
        "steps 700–900",
        "final, step 1,000",
    ]


def test_a_row_of_panels_per_role() -> None:
    table = trajectory(roles=["query", "value"])
    figure = magnitude_direction(table)
    assert [axes.get_title() for axes in panels(figure)] == [
        f"{method}, {role}" for role in ("query", "value") for method in ("FT", "LoRA", "DoRA")
    ]
    rows = [axes.get_subplotspec().rowspan.start for axes in panels(figure)]  # type: ignore[union-attr]
    assert rows == [0, 0, 0, 1, 1, 1]
    assert [bool(axes.get_xlabel()) for axes in panels(figure)] == [False] * 3 + [True] * 3
    expected = rows_of(table, "LoRA", "value")["delta_direction"]
    assert sorted(offsets(panels(figure)[4])[:, 0]) == sorted(expected)
    by_role = magnitude_direction(table, by="role")
    assert [axes.get_title() for axes in panels(by_role)] == ["query", "value"]


def places(figure: Figure) -> dict[str, tuple[int, int]]:
    """Line and column of each panel, by its title."""
    found = {}
    for axes in panels(figure):
        spec = axes.get_subplotspec()
        assert spec is not None
        found[axes.get_title()] = (spec.rowspan.start, spec.colspan.start)
    return found


@pytest.mark.parametrize("style", ["paper", "slide"])
def test_the_power_of_ten_is_apart_from_ticks_and_label(style: StyleName) -> None:
    table = trajectory(roles=["query", "value"])
    table["delta_direction"] *= 1e-6
    figure = magnitude_direction(table, style=style)
    figure.savefig(io.BytesIO())
    for axes in panels(figure):
        power = axes.xaxis.get_offset_text()
        assert "10" in power.get_text()
        others = [*axes.get_xticklabels(), axes.xaxis.label]
        low, high = axes.get_xlim()
        shown = [
            text for text in others if text.get_text() and low <= text.get_position()[0] <= high
        ]
        box = power.get_window_extent()
        assert not any(box.overlaps(text.get_window_extent()) for text in shown)


def test_a_method_without_a_role_has_a_gap_for_a_panel() -> None:
    table = pd.concat([trajectory(["FT"]), trajectory(["LoRA"], roles=["query", "value", "key"])])
    figure = magnitude_direction(table)
    assert places(figure) == {
        **{"FT, query": (0, 0), "LoRA, query": (0, 1)},
        **{"LoRA, value": (1, 1), "LoRA, key": (2, 1)},
    }
    assert all(len(offsets(axes)) and axes.texts for axes in panels(figure))
    assert [bool(axes.get_ylabel()) for axes in panels(figure)] == [True, False, True, True]
    assert [bool(axes.get_xlabel()) for axes in panels(figure)] == [True, False, False, True]
    below_each_other = magnitude_direction(table, style="column")
    assert list(places(below_each_other).values()) == [(line, 0) for line in range(4)]


def test_panels_follow_each_other_where_half_would_be_gaps() -> None:
    roles = {"FT": "query", "LoRA": "value", "DoRA": "key", "PiSSA": "up", "rsLoRA": "down"}
    several = pd.concat([trajectory([method], roles=[role]) for method, role in roles.items()])
    titles = [f"{method}, {role}" for method, role in roles.items()]
    two = several[several["method"].isin(["FT", "LoRA"])]
    assert places(magnitude_direction(two)) == dict(zip(titles, [(0, 0), (0, 1)], strict=False))
    grid = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert places(magnitude_direction(several)) == dict(zip(titles, grid, strict=True))


def test_roles_of_many_methods_begin_a_line_each() -> None:
    names = [f"method {i}" for i in range(6)]
    table = pd.concat([trajectory(names), trajectory(names[:5], roles=["value"])])
    found = places(magnitude_direction(table))
    assert len(found) == 6 + 5
    assert found["method 5, query"] == (1, 2)
    assert found["method 0, value"] == (2, 0)
    assert found["method 4, value"] == (3, 1)


def test_many_methods_wrap_into_rows() -> None:
    figure = magnitude_direction(trajectory([f"method {i}" for i in range(7)], layers=3))
    places = [axes.get_subplotspec() for axes in panels(figure)]
    assert [spec.rowspan.start for spec in places if spec] == [0, 0, 0, 0, 1, 1, 1]
    labelled = [axes.get_title()[:8] for axes in panels(figure) if axes.get_xlabel()]
    assert labelled == ["method 3", "method 4", "method 5", "method 6"]


def test_runs_of_a_method_share_a_panel_half_transparent() -> None:
    single, several = trajectory(["FT"]), trajectory(["FT"], runs=3)
    (one,), (many,) = panels(magnitude_direction(single)), panels(magnitude_direction(several))
    assert len(offsets(many)) == 3 * len(offsets(one))
    assert many.collections[0].get_alpha() == 0.5
    assert one.collections[0].get_alpha() == 0.9


def test_forty_layers_get_a_colour_bar() -> None:
    figure = magnitude_direction(trajectory(["FT"], layers=40, stacks=[""]))
    assert [one.get_title().get_text() for one in figure.legends] == ["checkpoint"]
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert bar.get_ylabel() == "layer"
    assert bar.get_ylim() == (0, 39)
    (axes,) = panels(figure)
    assert len(set(colours(axes.collections[0]))) == 40


def test_sites_without_a_layer_are_grey() -> None:
    table = trajectory(["FT"], layers=3)
    table["layer"] = table["layer"].astype("Int64").where(table["layer"] > 0)
    figure = magnitude_direction(table)
    assert entries(figure, "layer") == ["1", "2", "none"]
    (axes,) = panels(figure)
    assert NO_LAYER_COLOUR in colours(axes.collections[0])


def test_rows_that_are_not_finite_are_not_drawn() -> None:
    table = trajectory(["FT"])
    table.loc[table.index[1], "delta_direction"] = np.nan
    table.loc[table.index[2], "delta_magnitude"] = np.inf
    (axes,) = panels(magnitude_direction(table))
    assert len(offsets(axes)) == 46
    assert "n = 46" in axes.texts[0].get_text()


def test_one_point_has_no_line_and_no_r() -> None:
    (axes,) = panels(magnitude_direction(trajectory(["FT"]).iloc[:2]))
    assert len(offsets(axes)) == 1
    assert not axes.lines
    assert axes.texts[0].get_text() == "r not defined\nn = 1"


def test_draws_into_given_axes() -> None:
    figure = Figure()
    given = figure.subplots(1, 3)
    assert magnitude_direction(trajectory(), ax=given) is figure
    assert [len(offsets(axes)) for axes in given] == [48, 48, 48]
    legends = [one for one in given[-1].get_children() if type(one).__name__ == "Legend"]
    assert len(legends) == 2
    with pytest.raises(ValueError, match="3 panels are to be drawn, but 2 axes given"):
        magnitude_direction(trajectory(), ax=given[:2])


def test_styles_differ_in_size_and_leave_settings_alone() -> None:
    before = dict(mpl.rcParams)
    paper, slide = (magnitude_direction(trajectory(), style=name) for name in ("paper", "slide"))
    assert paper.get_figwidth() == 6.75
    assert slide.get_figwidth() > 10
    assert float(panels(slide)[0].title.get_fontsize()) >= 14
    assert dict(mpl.rcParams) == before
    with pytest.raises(ValueError, match="style 'poster' is unknown; choose one of 'paper'"):
        magnitude_direction(trajectory(), style="poster")  # type: ignore[arg-type]


def test_no_figure_is_left_with_pyplot() -> None:
    def open_figures() -> list[int]:
        pyplot = sys.modules.get("matplotlib.pyplot")
        return pyplot.get_fignums() if pyplot is not None else []

    before = open_figures()
    magnitude_direction(trajectory())
    assert open_figures() == before


def test_the_table_is_not_changed() -> None:
    table = trajectory()
    before = table.copy()
    magnitude_direction(table, title="title")
    pd.testing.assert_frame_equal(table, before)


def test_what_cannot_be_drawn_is_said_in_one_sentence() -> None:
    table = trajectory()
    with pytest.raises(ValueError, match=r"^the table has no rows, so there is nothing to draw\.$"):
        magnitude_direction(table.iloc[:0])
    with pytest.raises(ValueError, match=r"^the table has no column 'role', 'delta_direction'\.$"):
        magnitude_direction(table.drop(columns=["delta_direction", "role"]))
    with pytest.raises(ValueError, match=r"^column 'delta_magnitude' should hold numbers"):
        magnitude_direction(table.assign(delta_magnitude="many"))
    with pytest.raises(ValueError, match="nowhere finite after step 0"):
        magnitude_direction(table[table["step"] == 0])
    with pytest.raises(ValueError, match=r"^column 'delta_magnitude' holds 1e\+308: that is too"):
        magnitude_direction(table.assign(delta_magnitude=1e308))
