"""The figure of the DoRA paper: change in magnitude against change in direction, per method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from dora_dynamics.errors import InputError
from dora_dynamics.plotting._figure import StyledFigure
from dora_dynamics.plotting._legends import Layers, dot, legends
from dora_dynamics.plotting._panels import Panel, add_headroom, label_outer, panels, refuse_many
from dora_dynamics.plotting._rows import checked, finite
from dora_dynamics.plotting._style import (
    FINAL_MARKER,
    INTERMEDIATE_MARKERS,
    LINE_COLOUR,
    MARKER_SCALE,
    Style,
    StyleName,
    context,
    correlation,
    signed_number,
    style_named,
)
from dora_dynamics.shown_text import in_figure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_FINAL: Final = len(INTERMEDIATE_MARKERS)
_HEADROOM: Final = 0.30
_CROWDED: Final = 150
_THIRDS: Final = ("early", "middle", "late")


def magnitude_direction(
    trajectory: pd.DataFrame,
    *,
    by: str = "method",
    coupling: pd.DataFrame | None = None,
    signed: bool = False,
    ax: Axes | Iterable[Axes] | np.ndarray | None = None,
    legend: bool = True,
    style: StyleName = "paper",
    title: str | None = None,
) -> Figure:
    """Draws ΔM against ΔD as in Figures 2 and 5 of the DoRA paper (arXiv:2402.09353).

    One panel per method (FT, LoRA, DoRA first), and a row of such panels per role; none where a
    method has no points of a role. A point is one
    weight at one checkpoint; its colour is the layer, which the stacks of a model share, and its
    marker the checkpoint. The last step of a run is its final checkpoint. Where a run has more than
    three steps before it, these are drawn in three equal parts, early to late, one marker each.
    Points of several runs (seeds) of one method are drawn alike but half transparent, and belong to
    the same line. Rows of step 0 and rows with a NaN or infinite measure are not drawn.

    Each panel carries Pearson's r of all its points with its interval, the least-squares slope
    and the number of points, and the line of that slope through the points' mean. They are computed
    by `dora_dynamics.statistics.coupling`, not here.

    Args:
        trajectory: Table of `dora_dynamics.trajectory`; further columns do not matter. Values of a
            categorical column keep the order of its categories.
        by: Column that has a panel per value.
        coupling: What `statistics.coupling(..., level="pooled")` returned for `by` and, where the
            trajectory has several, ``role``. Computed from the drawn rows where None.
        signed: Draw the mean of m′ − m₀, which may be negative, in place of that of |m′ − m₀|.
        ax: Axes to draw into, as many as there are panels, role by role (one alone for one
            panel), or one for every method of every role, such as those of a seaborn FacetGrid;
            a new figure where None.
        legend: Draw the legends of layers and checkpoints.
        style: "paper" (6.75 in wide, one panel 3.25 in), "column" (panels below each other, 3.25 in
            wide) or "slide".
        title: Title of the figure.

    Returns:
        The figure, that of `ax` or a new one that is not registered with pyplot.

    Raises:
        InputError: The table is empty, lacks a column or has nothing finite to draw, `coupling` has
            not exactly one row for a panel, or the axes are too few or too many.
    """
    look = style_named(style)
    measure = "signed_delta_magnitude" if signed else "delta_magnitude"
    rows = checked(trajectory, [by, "run", "role"], ["step", "layer", "delta_direction", measure])
    rows = finite(rows[rows["step"] != 0], ["delta_direction", measure])
    rows["checkpoint"] = _checkpoints(rows, by)
    refuse_many(len(rows.groupby([by, "role"])))
    table = coupling
    if table is None:
        table = _pooled(trajectory.iloc[rows.index], by, signed)
    layers = Layers.of(rows)
    unit = str(trajectory.attrs.get("axis", "output"))
    with context(look):
        figure, drawn = panels(rows, by, look, ax, order=trajectory)
        crowd = max(len(panel.rows) for panel in drawn)
        area = look.marker_area * min(1.0, max(0.3, math.sqrt(_CROWDED / crowd)))
        said = []
        for panel in drawn:
            _points(panel, layers, measure, look, area)
            statistic = _statistic(table, panel, by, signed)
            said.append((panel, _wording(statistic, len(panel.rows))))
            _regression(panel, float(statistic["slope"]), measure)
        add_headroom(drawn, _HEADROOM)
        for panel, words in said:
            _print(panel, words)
        delta = "signed ΔM" if signed else "ΔM"
        label_outer(drawn, f"ΔD (mean over {unit} units)", f"{delta} (mean over {unit} units)")
        if legend:
            entries = {
                "layer": layers.handles(look),
                "checkpoint": _checkpoint_handles(rows, by, look),
            }
            legends(figure, drawn, layers, entries, style=look, own_layout=ax is None)
        if title is not None:
            figure.suptitle(title)
        if isinstance(figure, StyledFigure):
            panels_in_words = "; ".join(
                f"{panel.title}: {words.replace(chr(10), ', ')}" for panel, words in said
            )
            figure.alt = (
                f"Scatter plots of {delta} against ΔD, a panel per {by}, a point per weight and "
                f"checkpoint, with least-squares lines. {panels_in_words}."
            )
    return figure


def _checkpoints(rows: pd.DataFrame, by: str) -> pd.Series:
    """Which of the four markers each row has: 0 to 2 for intermediate steps, 3 for a run's last."""
    index = pd.Series(_FINAL, index=rows.index)
    for _, run in rows.groupby([by, "run"], sort=False):
        earlier = sorted(set(run["step"]))[:-1]
        parts = np.array_split(np.asarray(earlier), _FINAL)
        for number, part in enumerate(parts):
            index[run.index[run["step"].isin(part)]] = number
    return index


def _checkpoint_handles(rows: pd.DataFrame, by: str, style: Style) -> list[Line2D]:
    """Legend entries; they name steps where all runs share them, else the order alone."""
    runs = [sorted(set(run["step"])) for _, run in rows.groupby([by, "run"], sort=False)]
    steps = {
        number: sorted(set(rows.loc[rows["checkpoint"] == number, "step"]))
        for number in sorted(set(rows["checkpoint"]))
    }
    shared = all(run == runs[0] for run in runs)
    ordinal = runs[0] == [float(number) for number in range(1, len(runs[0]) + 1)]
    parted = max(map(len, runs)) > _FINAL + 1
    labels = {}
    for number, part in steps.items():
        first, last = f"{part[0]:,.0f}", f"{part[-1]:,.0f}"
        name = "final" if number == _FINAL else f"intermediate {number + 1}"
        if parted and number != _FINAL:
            name = _THIRDS[number]
        if shared and not ordinal:
            where = f"step {first}" if first == last else f"steps {first}–{last}"
            name = f"final, {where}" if number == _FINAL else where
        labels[number] = name
    return [
        dot(style, (*INTERMEDIATE_MARKERS, FINAL_MARKER)[number], LINE_COLOUR, name)
        for number, name in labels.items()
    ]


def _points(panel: Panel, layers: Layers, measure: str, style: Style, area: float) -> None:
    axes = panel.axes
    axes.set_title(in_figure(panel.title))
    for number, marker in enumerate((*INTERMEDIATE_MARKERS, FINAL_MARKER)):
        part = panel.rows[panel.rows["checkpoint"] == number]
        if part.empty:
            continue
        axes.scatter(
            part["delta_direction"],
            part[measure],
            s=area * MARKER_SCALE[marker],
            c=layers.colours(part["layer"]),
            marker=marker,
            alpha=0.5 if panel.rows["run"].nunique() > 1 else 0.9,
            edgecolors="white",
            linewidths=0.25 * style.line_width * math.sqrt(area / style.marker_area),
            zorder=2,
        )
    axes.locator_params(nbins=4)


def _regression(panel: Panel, slope: float, measure: str) -> None:
    """The line of a slope through the points' mean."""
    x, y = panel.rows["delta_direction"], panel.rows[measure]
    if np.isfinite(slope):
        ends = np.array([x.min(), x.max()])
        panel.axes.plot(ends, y.mean() + slope * (ends - x.mean()), color=LINE_COLOUR, zorder=3)


def _print(panel: Panel, words: str) -> None:
    """The statistic, in the room above the highest point."""
    panel.axes.text(
        0.04,
        0.97,
        words,
        transform=panel.axes.transAxes,
        va="top",
        zorder=1.2,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        linespacing=1.3,
        color=LINE_COLOUR,
    )


def _wording(statistic: pd.Series, drawn: int) -> str:
    r, slope, count = (float(statistic[name]) for name in ("pearson", "slope", "n"))
    if not np.isfinite(r):
        return f"r not defined\nn = {drawn}"
    interval = ""
    if {"pearson_low", "pearson_high"} <= set(statistic.index):
        ends = float(statistic["pearson_low"]), float(statistic["pearson_high"])
        if np.isfinite(ends).all():
            interval = f" [{', '.join(correlation(end) for end in ends)}]"
    return f"r = {correlation(r)}{interval}\nslope {signed_number(slope)}, n = {count:.0f}"


def _pooled(drawn: pd.DataFrame, by: str, signed: bool) -> pd.DataFrame:
    """The pooled coupling of the drawn rows; nobody sees a p-value, so none is computed."""
    from dora_dynamics.statistics import coupling

    groups = list(dict.fromkeys([by, "role"]))
    return coupling(drawn, by=groups, level="pooled", signed=signed, permutations=0)


def _statistic(table: pd.DataFrame, panel: Panel, by: str, signed: bool) -> pd.Series:
    """The one row of a coupling table that belongs to a panel."""
    missing = [name for name in (by, "pearson", "slope", "n") if name not in table.columns]
    if missing:
        raise InputError(f"coupling has no column {', '.join(map(repr, missing))}.")
    mine = table[table[by].astype(str) == panel.group]
    if panel.role and "role" in table.columns:
        mine = mine[mine["role"].astype(str) == panel.role]
    if "level" in table.columns:
        mine = mine[mine["level"] == "pooled"]
    if "signed" in table.columns:
        mine = mine[mine["signed"].astype(bool) == signed]
    if len(mine) != 1:
        raise InputError(
            f"coupling should have one pooled row for {panel.title!r} with signed={signed}, "
            f"but has {len(mine)}."
        )
    return mine.iloc[0]
