"""A grid of panels, one per method and role.

The rule of `ax=` in every figure: one axes for each panel, in the order of the panels; one axes
alone where there is one panel. Legends then stand at the right of the last axes, and are left out
with `legend=False`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from dora_dynamics.errors import InputError
from dora_dynamics.plotting._figure import StyledFigure
from dora_dynamics.plotting._rows import order_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dora_dynamics.plotting._style import Style

    Drawable: TypeAlias = Axes | Iterable[Axes] | np.ndarray | None
    Cell: TypeAlias = tuple[str, str]
    """A group and a role."""

_MOST_PANELS: Final = 150


def refuse_many(panels: int) -> None:
    """`InputError` where nobody could look at, or wait for, so many panels."""
    if panels > _MOST_PANELS:
        raise InputError(
            f"{panels:,} panels are more than the {_MOST_PANELS} that a figure can hold: draw the "
            "rows of some methods and roles."
        )


@dataclass(frozen=True)
class Panel:
    """One panel of a grid: where it is drawn and which rows belong to it."""

    axes: Axes
    group: str
    role: str
    rows: pd.DataFrame

    @property
    def title(self) -> str:
        """The group and, where it is known, the role."""
        return f"{self.group}, {self.role}" if self.role else self.group

    @property
    def place(self) -> tuple[int, int] | None:
        """Its line and column in the figure; None for axes of no grid."""
        spec = self.axes.get_subplotspec()
        return None if spec is None else (spec.rowspan.start, spec.colspan.start)


def panels(
    rows: pd.DataFrame,
    by: str,
    style: Style,
    ax: Drawable,
    *,
    order: pd.DataFrame,
) -> tuple[Figure, list[Panel]]:
    """A panel per group and role that have rows, role by role.

    A new figure has a line of panels per role and a column per group, with a gap where a group
    lacks a role. Where that does not fit on a line, or half of it would be gaps, panels follow each
    other.

    Args:
        rows: Table with columns `by` and ``role``.
        by: Column whose values are the groups.
        style: Sizes of a new figure.
        ax: Axes to draw into, one for each panel, or one for each group of each role, of which
            those without rows are left alone; a new figure where None.
        order: The table the rows are of: its categories order the panels.

    Raises:
        InputError: The axes are too few or too many, or belong to no figure.
    """
    group_of, role_of = rows[by], rows["role"]
    groups, roles = order_of(order, by, group_of), order_of(order, "role", role_of)
    if by == "role":
        role_of, roles = role_of.map(lambda _: ""), [""]
    rows_of = dict(iter(rows.groupby([group_of, role_of], sort=False)))
    grid = [[(group, role) for group in groups] for role in roles]
    cells = [cell for line in grid for cell in line if cell in rows_of]
    refuse_many(len(cells))
    figure: Figure
    if ax is None:
        figure, axes_of = _new_grid(_lines(grid, cells, style.most_columns), style)
    else:
        flat = _flat(ax)
        with_gaps = [cell for line in grid for cell in line]
        theirs = with_gaps if len(flat) == len(with_gaps) else cells
        figure, flat = given_axes(flat, len(theirs))
        axes_of = dict(zip(theirs, flat, strict=True))
    return figure, [Panel(axes_of[cell], *cell, rows_of[cell]) for cell in cells]


def given_axes(ax: Drawable, needed: int) -> tuple[Figure, list[Axes]]:
    """The caller's axes, of which as many are needed as there are panels, and their figure."""
    flat = _flat(ax)
    if len(flat) != needed:
        raise InputError(
            f"ax: {needed} panels are to be drawn, but {len(flat)} axes given; give one for each "
            "panel, or keep the rows of fewer panels."
        )
    figure = flat[0].get_figure(root=True)
    if figure is None:
        raise InputError("ax: the axes belong to no figure.")
    return figure, flat


def _flat(ax: Drawable) -> list[Axes]:
    several = list(ax) if np.iterable(ax) else [ax]
    return list(np.asarray(several, dtype=object).ravel())


def _lines(
    grid: Sequence[Sequence[Cell]], filled: Sequence[Cell], most: int
) -> list[list[Cell | None]]:
    """The cells of each line of a new figure, at most so many; None is a gap."""
    if 2 * len(filled) <= sum(map(len, grid)):
        return _wrapped(filled, most)
    known = set(filled)
    lines: list[list[Cell | None]] = []
    for line in grid:
        if len(line) <= most:
            lines.append([cell if cell in known else None for cell in line])
        else:
            lines += _wrapped([cell for cell in line if cell in known], most)
    return lines


def _wrapped(cells: Sequence[Cell], most: int) -> list[list[Cell | None]]:
    lines = math.ceil(len(cells) / most)
    columns = math.ceil(len(cells) / lines)
    return [list(cells[i * columns : (i + 1) * columns]) for i in range(lines)]


def _new_grid(
    lines: Sequence[Sequence[Cell | None]], style: Style
) -> tuple[StyledFigure, dict[Cell, Axes]]:
    columns = max(map(len, lines))
    width = style.column_width if columns == 1 else style.text_width
    height = style.panel_height * (len(lines) + 0.35)
    figure = StyledFigure(style, figsize=(width, height), layout="constrained")
    places = figure.add_gridspec(len(lines), columns)
    return figure, {
        cell: figure.add_subplot(places[row, column])
        for row, line in enumerate(lines)
        for column, cell in enumerate(line)
        if cell is not None
    }


def add_headroom(drawn: Sequence[Panel], share: float) -> None:
    """Room above the data for text; panels that share their y axis get it once."""
    done: set[Axes] = set()
    for panel in drawn:
        if panel.axes not in done:
            done |= set(panel.axes.get_shared_y_axes().get_siblings(panel.axes))
            panel.axes.autoscale_view()
            low, high = panel.axes.get_ylim()
            panel.axes.set_ylim(low, high + share * (high - low))


def label_outer(drawn: Sequence[Panel], x_label: str, y_label: str) -> None:
    """Labels the x axes of panels with none below them, and the y axes of each line's first."""
    lowest: dict[int, int] = {}
    first: dict[int, int] = {}
    for row, column in filter(None, (panel.place for panel in drawn)):
        lowest[column] = max(row, lowest.get(column, row))
        first[row] = min(column, first.get(row, column))
    for panel in drawn:
        place = panel.place
        if place is None or place[0] == lowest[place[1]]:
            panel.axes.set_xlabel(x_label)
        # Behind the last tick's label and not below it, where the x label of a wide panel ends.
        panel.axes.xaxis.get_offset_text().set(x=1.05, ha="left", va="bottom")
        if place is None or place[1] == first[place[0]]:
            panel.axes.set_ylabel(y_label)
