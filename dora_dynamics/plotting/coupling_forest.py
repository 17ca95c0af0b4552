"""Correlations with their intervals, side by side: a dot-and-interval plot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from dora_dynamics.errors import InputError
from dora_dynamics.plotting._figure import StyledFigure
from dora_dynamics.plotting._legends import beside, dot
from dora_dynamics.plotting._panels import given_axes, refuse_many
from dora_dynamics.plotting._rows import checked, order_of
from dora_dynamics.plotting._style import (
    LAYER_COLOURS,
    LINE_COLOUR,
    Style,
    StyleName,
    context,
    correlation,
    style_named,
)
from dora_dynamics.shown_text import in_figure

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS: Final = ("o", "s", "D", "^", "v")
_NAMES: Final = {
    "pooled": "pooled",
    "within_step": "within step",
    "within_layer": "within layer",
    "units": "across units",
}
_NUMBERS: Final = ("pearson", "pearson_low", "pearson_high")


def coupling_forest(
    coupling: pd.DataFrame,
    *,
    by: str = "method",
    ax: Axes | Iterable[Axes] | np.ndarray | None = None,
    legend: bool = True,
    style: StyleName = "paper",
    title: str | None = None,
) -> Figure:
    """Draws Pearson's r and its interval for every method, role and level of pooling.

    One panel per role, all from −1 to 1 with a line at zero; one line of text per method (FT, LoRA,
    DoRA first), within it one dot per level in the order of the table, told apart by colour and
    marker. A row whose r is NaN has no dot, one whose interval is NaN has no bar. A column
    ``paper``, where there is one, is drawn as a hollow diamond beside r: the published value.

    Args:
        coupling: What `dora_dynamics.statistics.coupling` returned, or several of these one below
            the other; at most one row for each method, role and level.
        by: Column that has a line per value; a categorical keeps the order of its categories.
        ax: Axes to draw into, one per role; a new figure where None.
        legend: Draw the legend of levels.
        style: "paper", "column" (panels below each other) or "slide".
        title: Title of the figure.

    Returns:
        The figure, that of `ax` or a new one that is not registered with pyplot.

    Raises:
        InputError: The table is empty, lacks a column, or has several rows of one place, or
            the axes are too few or too many.
    """
    look = style_named(style)
    published = ["paper"] if "paper" in coupling.columns else []
    table = coupling.assign(role=coupling["role"] if "role" in coupling.columns else "")
    rows = checked(table, [by, "role", "level"], [*_NUMBERS, *published])
    again = rows[rows.duplicated([by, "role", "level"])]
    if len(again):
        place = ", ".join(str(part) for part in again.iloc[0][[by, "role", "level"]] if part)
        raise InputError(f"coupling has several rows for {place}; keep one of them.")
    groups, roles = order_of(table, by, rows[by]), order_of(table, "role", rows["role"])
    levels = list(dict.fromkeys(rows["level"]))
    refuse_many(len(roles) * len(groups))
    with context(look):
        figure: Figure
        if ax is None:
            figure, all_axes = _grid(len(roles), len(groups), len(levels), look)
        else:
            figure, all_axes = given_axes(ax, len(roles))
        for axes, role in zip(all_axes, roles, strict=True):
            _frame(axes, groups, look)
            axes.set_title(in_figure(role))
            _dots(axes, rows[rows["role"] == role], by, groups, levels, look)
        handles = [
            dot(look, _MARKERS[i % len(_MARKERS)], _colour(i), _NAMES.get(level, in_figure(level)))
            for i, level in enumerate(levels)
        ]
        if published:
            handles.append(dot(look, "D", LINE_COLOUR, "paper", filled=False))
        if legend and ax is None:
            columns = min(len(handles), 3 if figure.get_figwidth() < look.text_width else 6)
            figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        elif legend:
            beside(all_axes[-1], handles, None, 0)
        if title is not None:
            figure.suptitle(title)
        if isinstance(figure, StyledFigure):
            figure.alt = _in_words(rows, by)
    return figure


def _in_words(rows: pd.DataFrame, by: str) -> str:
    found = [
        f"{', '.join(part for part in (row[by], row['role'], row['level']) if part)}: "
        f"{correlation(row['pearson'])} "
        f"[{correlation(row['pearson_low'])}, {correlation(row['pearson_high'])}]"
        for row in rows.to_dict("records")
        if np.isfinite(row["pearson"])
    ]
    return f"Pearson's r of ΔM and ΔD with its interval. {'; '.join(found)}."


def _grid(roles: int, groups: int, levels: int, style: Style) -> tuple[StyledFigure, list[Axes]]:
    columns = min(roles, style.most_columns)
    lines = math.ceil(roles / columns)
    width = style.column_width if columns == 1 else style.text_width
    line = style.font_size / 72
    height = line * (3.0 + lines * (3.5 + groups * (1.3 * levels + 1.0)))
    figure = StyledFigure(style, figsize=(width, height), layout="constrained")
    grid = list(figure.subplots(lines, columns, sharey=True, squeeze=False).ravel())
    for unused in grid[roles:]:
        unused.remove()
    return figure, grid[:roles]


def _frame(axes: Axes, groups: list[str], style: Style) -> None:
    axes.axvline(0, color=LINE_COLOUR, linewidth=0.6 * style.line_width, zorder=1)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), [in_figure(group) for group in groups])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    for edge in range(1, len(groups)):
        axes.axhline(edge - 0.5, color="#E6E6E6", linewidth=0.4 * style.line_width, zorder=0.5)
    axes.set_xlabel("Pearson r of ΔM and ΔD")


def _colour(level: int) -> str:
    return LAYER_COLOURS[level % len(LAYER_COLOURS)]


def _dots(
    axes: Axes, rows: pd.DataFrame, by: str, groups: list[str], levels: list[str], style: Style
) -> None:
    offsets = (np.arange(len(levels)) - (len(levels) - 1) / 2) * 0.8 / max(len(levels), 1)
    for number, level in enumerate(levels):
        part = rows[rows["level"] == level]
        places = part[by].map(groups.index).to_numpy(dtype=np.float64) + offsets[number]
        r, low, high = (part[name].to_numpy(dtype=np.float64) for name in _NUMBERS)
        axes.hlines(places, low, high, color=_colour(number), linewidth=style.line_width, zorder=2)
        axes.scatter(
            r,
            places,
            s=style.marker_area * 1.4,
            color=_colour(number),
            marker=_MARKERS[number % len(_MARKERS)],
            edgecolors="white",
            linewidths=0.3 * style.line_width,
            zorder=3,
        )
        if "paper" in part.columns:
            axes.scatter(
                part["paper"],
                places,
                s=style.marker_area * 1.2,
                facecolors="none",
                edgecolors=LINE_COLOUR,
                linewidths=0.6 * style.line_width,
                marker="D",
                zorder=4,
            )
