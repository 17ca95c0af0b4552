"""What every figure of the package promises: fonts, sizes, words, the caller's axes and tables."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from dora_dynamics.plotting import coupling_forest, magnitude_direction, save, trajectories
from dora_dynamics.plotting._style import LAYER_MARKERS, METHOD_COLOURS, METHOD_MARKERS
from dora_dynamics.statistics import coupling
from tests.plotting.plotting_tables import trajectory
from tests.plotting.test_style import VISIONS, lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Draw = Callable[..., Figure]


def forest(table: pd.DataFrame, **options: Any) -> Figure:
    return coupling_forest(coupling(table, by=["method", "role"], permutations=0), **options)


EVERY: dict[str, Draw] = {
    "magnitude_direction": magnitude_direction,
    "trajectories": trajectories,
    "coupling_forest": forest,
}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(params=list(EVERY))
def draw(request: pytest.FixtureRequest) -> Draw:
    return EVERY[request.param]


def marks(figure: Figure) -> list[str]:
    """All that was drawn inside the axes, as text that two figures can be compared by."""
    found = []
    for axes in figure.axes:
        found += [str(np.asarray(points.get_offsets()).tolist()) for points in axes.collections]
        found += [str(np.asarray(line.get_xydata()).tolist()) for line in axes.lines]
        found += [axes.get_title(), *(text.get_text() for text in axes.texts)]
    return found


def test_plain_savefig_embeds_editable_fonts_whatever_the_settings(draw: Draw) -> None:
    figure = draw(trajectory(["FT"], layers=2))
    file, svg = io.BytesIO(), io.StringIO()
    with mpl.rc_context({"pdf.fonttype": 3, "svg.fonttype": "path", "font.family": "serif"}):
        figure.savefig(file, format="pdf")
        figure.savefig(svg, format="svg")
        assert mpl.rcParams["pdf.fonttype"] == 3
    assert b"/FontFile2" in file.getvalue()
    assert b"/Type3" not in file.getvalue()
    assert ">FT" in svg.getvalue()
    assert "serif" not in svg.getvalue().replace("sans-serif", "").replace("DejaVu Sans", "")


def test_vector_files_hold_no_pixels(draw: Draw, tmp_path: Path) -> None:
    pdf, svg = save(draw(trajectory(["FT"], layers=2)), tmp_path / "figure", ["pdf", "svg"])
    assert b"/Subtype /Image" not in pdf.read_bytes()
    assert "<image" not in svg.read_text(encoding="utf-8")


@pytest.mark.parametrize(("style", "widths"), [("paper", {3.25, 6.75}), ("column", {3.25})])
def test_figures_fit_a_column_or_the_page(draw: Draw, style: str, widths: set[float]) -> None:
    for methods, roles in ((["FT"], ["query"]), (["FT", "LoRA"], ["query", "value"])):
        figure = draw(trajectory(methods, layers=2, roles=roles), style=style)
        assert figure.get_figwidth() in widths
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert box.x0 >= -0.01
        assert box.x1 <= figure.get_figwidth() + 0.01
        smallest = min(text.get_fontsize() for text in figure.findobj(mpl.text.Text))
        assert float(smallest) >= 6


def test_column_style_puts_panels_below_each_other_and_one_legend(draw: Draw) -> None:
    figure = draw(trajectory(["FT", "DoRA"], roles=["query", "value"], layers=3), style="column")
    figure.draw_without_rendering()
    left = [axes.get_position().x0 for axes in figure.axes]
    top = [axes.get_position().y1 for axes in figure.axes]
    assert max(left) - min(left) < 0.01
    assert top == sorted(top, reverse=True)
    (legend,) = figure.legends
    assert not any(
        legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes
    )


def test_slides_have_large_type(draw: Draw) -> None:
    figure = draw(trajectory(), style="slide")
    assert float(figure.axes[0].title.get_fontsize()) >= 14


def test_ax_takes_the_callers_axes_and_leaves_the_rest_of_the_figure(draw: Draw) -> None:
    table = trajectory(["FT"])
    figure = Figure()
    first, second = figure.subplots(1, 2)
    second.plot([0, 1], label="mine")
    mine = second.legend()
    assert draw(table, ax=second) is figure
    assert not first.has_data()
    assert second.get_legend() is mine
    legends = [child for child in second.get_children() if isinstance(child, Legend)]
    assert len(legends) >= 2
    assert not figure.legends
    alone = Figure().subplots()
    draw(table, ax=alone, legend=False)
    assert not [child for child in alone.get_children() if isinstance(child, Legend)]
    own = draw(table)
    assert set(marks(own)) <= set(marks(figure))


def test_too_few_axes_are_said(draw: Draw) -> None:
    needed = 2 if draw is forest else 6
    with pytest.raises(ValueError, match=rf"ax: {needed} panels are to be drawn, but 1 axes given"):
        draw(trajectory(roles=["query", "value"]), ax=Figure().subplots())


@pytest.mark.parametrize("draw", [magnitude_direction, trajectories])
def test_axes_for_each_panel_or_for_gaps_too(draw: Draw) -> None:
    table = pd.concat([trajectory(["FT"]), trajectory(["LoRA"], roles=["query", "value"])])
    own = marks(draw(table))
    for count in (3, 4):
        figure = Figure()
        axes = figure.subplots(1, count)
        assert set(own) <= set(marks(draw(table, ax=axes)))
        titles = [one.get_title() for one in axes if one.has_data()]
        assert titles == ["FT, query", "LoRA, query", "LoRA, value"]
        assert [one.has_data() for one in axes] == [True, True, count == 3, True][:count]
    with pytest.raises(ValueError, match="3 panels are to be drawn, but 2 axes given"):
        draw(table, ax=Figure().subplots(1, 2))


def test_subfigures_are_places_like_others(draw: Draw) -> None:
    whole = Figure(layout="constrained")
    left, right = np.ravel(whole.subfigures(1, 2))  # type: ignore[arg-type]
    panels = left.subplots(1 if draw is forest else 3, squeeze=False)
    assert draw(trajectory(), ax=panels) is whole
    assert not right.axes


def test_axes_of_a_facet_grid(draw: Draw) -> None:
    seaborn = pytest.importorskip("seaborn")
    table = trajectory(layers=3, roles=["query", "value"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facets = {"col": "role"} if draw is forest else {"row": "role", "col": "method"}
        grid = seaborn.FacetGrid(table, **facets)
    assert draw(table, ax=grid.axes) is grid.figure
    assert set(marks(draw(table))) <= set(marks(grid.figure))
    low, high = grid.axes.flat[0].get_ylim()
    if draw is magnitude_direction:  # room for the text once, though all panels share the axis
        spread = table.loc[table["step"] > 0, "delta_magnitude"]
        assert high - low < 1.5 * (spread.max() - spread.min())
    with mpl.rc_context():
        import matplotlib.pyplot as plt

        plt.close(grid.figure)


def test_further_columns_categories_and_any_index_do_not_matter(draw: Draw) -> None:
    plain = trajectory(layers=3, roles=["query", "value"])
    table = plain.assign(note="x", seed=1, when=pd.Timestamp("2026-01-01"))
    table = table.astype(dict.fromkeys(("run", "method", "site", "stack", "role"), "category"))
    table = table.astype({"layer": "Int64", "step": "Int64", "delta_magnitude": "Float64"})
    table.index = pd.MultiIndex.from_arrays([table["run"], range(len(table))])
    table["method"] = table["method"].cat.reorder_categories(["FT", "LoRA", "DoRA"])
    assert marks(draw(table)) == marks(draw(plain))


def test_categories_give_the_order(draw: Draw) -> None:
    table = trajectory(layers=3, roles=["query", "value"])
    methods = pd.CategoricalDtype(["DoRA", "unused", "FT", "LoRA"])
    roles = pd.CategoricalDtype(["value", "query"])
    figure = draw(table.astype({"method": methods, "role": roles}))
    titles = [axes.get_title() for axes in figure.axes]
    if draw is forest:
        assert titles == ["value", "query"]
        ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        assert ticks == ["DoRA", "FT", "LoRA"]
    else:
        assert titles == [
            f"{method}, {role}" for role in ("value", "query") for method in ("DoRA", "FT", "LoRA")
        ]


def test_layers_of_lines_differ_by_marker_too() -> None:
    (axes,) = trajectories(trajectory(["FT"], layers=7, stacks=[""])).axes
    assert [line.get_marker() for line in axes.lines] == list(LAYER_MARKERS)
    (many,) = trajectories(trajectory(["FT"], layers=20, stacks=[""])).axes[:1]
    assert {line.get_marker() for line in many.lines} == {""}


def test_methods_differ_by_colour_and_marker_for_every_reader() -> None:
    assert len(set(METHOD_MARKERS.values())) == len(METHOD_COLOURS) == 3
    for vision in VISIONS.values():
        seen = [lab(colour, vision) for colour in METHOD_COLOURS.values()]
        for i in range(3):
            assert np.linalg.norm(seen[i] - seen[i - 1]) > 15


def test_figures_say_in_words_what_they_show(draw: Draw, tmp_path: Path) -> None:
    figure = draw(trajectory(layers=3, stacks=[""]), title="A <title> & more")
    (path,) = save(figure, tmp_path / "figure", ["svg"])
    root = ElementTree.parse(path).getroot()
    title, description = (root.find(f"{SVG}{name}") for name in ("title", "desc"))
    assert root.get("role") == "img"
    assert title is not None
    assert description is not None
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert title.text == "A <title> & more"
    words = description.text or ""
    assert all(method in words for method in ("FT", "LoRA", "DoRA"))
    assert len(re.findall(r"[+−]?\d+\.\d+", words)) >= 3
    (other,) = save(figure, tmp_path / "other", ["svg"], title="T", alt="mine")
    assert "mine</desc>" in other.read_text(encoding="utf-8")


def test_pdf_and_png_carry_the_words(tmp_path: Path) -> None:
    from PIL import Image

    figure = magnitude_direction(trajectory(["FT"]))
    pdf, png = save(figure, tmp_path / "figure", ["pdf", "png"], title="Name", alt="Words")
    assert b"/Subject (Words)" in pdf.read_bytes()
    with Image.open(png) as image:
        assert image.info["Title"] == "Name"
        assert image.info["Description"] == "Words"
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_notebooks_show_figures_and_pickles_keep_them(draw: Draw) -> None:
    figure = draw(trajectory(["FT"]))
    shown = figure._repr_png_()  # type: ignore[attr-defined]
    assert shown.startswith(b"\x89PNG")
    again = pickle.loads(pickle.dumps(figure))  # noqa: S301
    assert again._repr_png_().startswith(b"\x89PNG")
    assert marks(again) == marks(figure)
