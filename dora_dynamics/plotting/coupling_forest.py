"""Correlations with their intervals, side by side: a dot-and-interval plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.figure import Figure

from dora_dynamics.plotting._panels import checked, dot, in_order
from dora_dynamics.plotting._style import (
    LAYER_COLOURS,
    LINE_COLOUR,
    Style,
    StyleName,
    context,
    style_named,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

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
        by: Column that has a line per value.
        style: "paper" or "slide".
        title: Title of the figure.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: The table is empty, lacks a column, or has several rows of one place.
    """
    look = style_named(style)
    published = ["paper"] if "paper" in coupling.columns else []
    table = coupling.assign(role=coupling["role"] if "role" in coupling.columns else "")
    rows = checked(table, [by, "role", "level"], [*_NUMBERS, *published])
    again = rows[rows.duplicated([by, "role", "level"])]
    if len(again):
        place = ", ".join(str(part) for part in again.iloc[0][[by, "role", "level"]] if part)
        raise ValueError(f"coupling has several rows for {place}; keep one of them.")
    groups, roles = in_order(rows[by]), list(dict.fromkeys(rows["role"]))
    levels = list(dict.fromkeys(rows["level"]))
    with context(look):
        figure = _figure(len(roles), len(groups), len(levels), look)
        all_axes = figure.subplots(1, len(roles), sharey=True, squeeze=False)[0]
        for axes, role in zip(all_axes, roles, strict=True):
            _frame(axes, groups, look)
            axes.set_title(role)
            _dots(axes, rows[rows["role"] == role], by, groups, levels, look)
        handles = [
            dot(look, _MARKERS[i % len(_MARKERS)], _colour(i), _NAMES.get(level, level))
            for i, level in enumerate(levels)
        ]
        if published:
            handles.append(dot(look, "D", LINE_COLOUR, "paper", filled=False))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        if title is not None:
            figure.suptitle(title)
    return figure


def _figure(roles: int, groups: int, levels: int, style: Style) -> Figure:
    width = style.column_width if roles == 1 else style.text_width
    line = style.font_size / 72
    height = line * (6.5 + groups * (1.3 * levels + 1.0))
    return Figure(figsize=(width, height), layout="constrained")


def _frame(axes: Axes, groups: list[str], style: Style) -> None:
    axes.axvline(0, color=LINE_COLOUR, linewidth=0.6 * style.line_width, zorder=1)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), groups)
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
