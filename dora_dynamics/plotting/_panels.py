"""What the figures of a trajectory share: checked rows, a grid of panels, legends of layers.

The rule of `ax=` in every figure: one axes for each panel, in the order of the panels; one axes
alone where there is one panel. Legends then stand at the right of the last axes, and are left out
with `legend=False`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dora_dynamics.errors import InputError
from dora_dynamics.plotting._figure import StyledFigure
from dora_dynamics.plotting._style import (
    FINAL_MARKER,
    LAYER_COLOURS,
    LAYER_MAP,
    LAYER_MARKERS,
    LINE_COLOUR,
    NO_LAYER_COLOUR,
    Style,
    layer_colours,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawable: TypeAlias = Axes | Iterable[Axes] | np.ndarray | None

_FIRST_METHODS: Final = ("FT", "LoRA", "DoRA")
_MOST_PANELS: Final = 150
_ONE_ROW: Final = 20
_IN_COLUMN: Final = 3
_Corner: TypeAlias = Literal[
    "outside lower left", "outside lower right", "outside right upper", "outside right lower"
]
_LOWER: Final[tuple[_Corner, _Corner]] = ("outside lower left", "outside lower right")
_RIGHT: Final[tuple[_Corner, _Corner]] = ("outside right upper", "outside right lower")

_LARGEST_DRAWN: Final = 1e300
"""Beyond it matplotlib finds no end of an axis."""


def checked(table: pd.DataFrame, text: Iterable[str], numbers: Iterable[str]) -> pd.DataFrame:
    """The rows with these columns, text as text and numbers as float64, indexed by position.

    Raises:
        InputError: The table is empty, lacks a column, or holds text where numbers belong.
    """
    text, numbers = list(dict.fromkeys(text)), list(dict.fromkeys(numbers))
    missing = [name for name in [*text, *numbers] if name not in table.columns]
    if missing:
        raise InputError(f"the table has no column {', '.join(map(repr, missing))}.")
    if table.empty:
        raise InputError("the table has no rows, so there is nothing to draw.")
    rows = table.reset_index(drop=True)
    columns: dict[str, pd.Series] = {}
    for name in text:
        columns[name] = rows[name].astype(object).where(rows[name].notna(), "").map(str)
    for name in numbers:
        try:
            columns[name] = pd.to_numeric(rows[name]).astype("Float64").astype("float64")
        except (TypeError, ValueError):
            raise InputError(f"column {name!r} should hold numbers, but holds text.") from None
    return pd.DataFrame(columns)


def finite(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows whose `columns` are all finite, index kept.

    Raises:
        InputError: none is left, or one holds a number too large for an axis.
    """
    good = np.isfinite(rows[list(columns)].to_numpy(dtype=np.float64)).all(axis=1)
    kept: pd.DataFrame = rows.loc[good].copy()
    if kept.empty:
        names = " and ".join(repr(name) for name in columns)
        raise InputError(f"no row to draw: {names} are nowhere finite after step 0.")
    for name in columns:
        largest = float(kept[name].abs().max())
        if largest > _LARGEST_DRAWN:
            raise InputError(f"column {name!r} holds {largest:.3g}: that is too large to draw.")
    return kept


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names: FT, LoRA and DoRA first, then the others as they first appear."""
    distinct = list(dict.fromkeys(names))
    known = [name for name in _FIRST_METHODS if name in distinct]
    return known + [name for name in distinct if name not in known]


def order_of(table: pd.DataFrame, column: str, present: Iterable[str]) -> list[str]:
    """The order of a column's values: that of a categorical, else that of `in_order`."""
    found = in_order(present)
    kind = table[column].dtype
    if isinstance(kind, pd.CategoricalDtype):
        given = list(map(str, kind.categories))
        return sorted(found, key=lambda name: given.index(name) if name in given else len(given))
    return found


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


def panels(
    rows: pd.DataFrame,
    by: str,
    style: Style,
    ax: Drawable,
    *,
    order: pd.DataFrame,
) -> tuple[Figure, list[Panel]]:
    """A grid with a block of panels per role and a panel per group in it.

    A block is one row of panels while they fit, else several rows. Panels without any row (a group
    that lacks a role) stay as empty, titled axes.

    Args:
        rows: Table with columns `by` and ``role``.
        by: Column whose values are the groups.
        style: Sizes of a new figure.
        ax: As many axes as there are panels, to draw into; a new figure where None.
        order: The table the rows are of: its categories order the panels.

    Raises:
        InputError: The axes are too few or too many, or belong to no figure.
    """
    group_of = rows[by]
    groups, roles = order_of(order, by, group_of), order_of(order, "role", rows["role"])
    if by == "role":
        rows, roles = rows.assign(role=""), [""]
    refuse_many(len(roles) * len(groups))
    keys = [(group, role) for role in roles for group in groups]
    figure: Figure
    if ax is None:
        figure, flat = _grid(len(roles), len(groups), style)
    else:
        figure, flat = given_axes(ax, len(keys))
    selected = [rows[(group_of == group) & (rows["role"] == role)] for group, role in keys]
    return figure, [
        Panel(one, group, role, mine)
        for one, (group, role), mine in zip(flat, keys, selected, strict=True)
    ]


def given_axes(ax: Drawable, needed: int) -> tuple[Figure, list[Axes]]:
    """The caller's axes, of which as many are needed as there are panels, and their figure."""
    several = list(ax) if np.iterable(ax) else [ax]
    flat: list[Axes] = list(np.asarray(several, dtype=object).ravel())
    if len(flat) != needed:
        raise InputError(
            f"ax: {needed} panels are to be drawn, but {len(flat)} axes given; give one for each "
            "panel, or keep the rows of fewer panels."
        )
    figure = flat[0].get_figure(root=True)
    if figure is None:
        raise InputError("ax: the axes belong to no figure.")
    return figure, flat


def _grid(blocks: int, count: int, style: Style) -> tuple[StyledFigure, list[Axes]]:
    lines = math.ceil(count / style.most_columns)
    columns = math.ceil(count / lines)
    width = style.column_width if columns == 1 else style.text_width
    height = style.panel_height * (blocks * lines + 0.35)
    figure = StyledFigure(style, figsize=(width, height), layout="constrained")
    grid = figure.subplots(blocks * lines, columns, squeeze=False)
    flat: list[Axes] = []
    for block in range(blocks):
        ours = list(grid[block * lines : (block + 1) * lines].ravel())
        for unused in ours[count:]:
            unused.remove()
        flat += ours[:count]
    return figure, flat


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
    """Labels the x axes of panels with none below them, and the y axes of the first column."""
    lowest: dict[int, int] = {}
    places = [_place(panel.axes) for panel in drawn]
    for row, column in filter(None, places):
        lowest[column] = max(row, lowest.get(column, row))
    for panel, place in zip(drawn, places, strict=True):
        if place is None or place[0] == lowest[place[1]]:
            panel.axes.set_xlabel(x_label)
        panel.axes.xaxis.get_offset_text().set_horizontalalignment("left")
        if place is None or place[1] == 0:
            panel.axes.set_ylabel(y_label)


def _place(axes: Axes) -> tuple[int, int] | None:
    spec = axes.get_subplotspec()
    return None if spec is None else (spec.rowspan.start, spec.colspan.start)


@dataclass(frozen=True)
class Layers:
    """The colour of every layer of a figure; sites without a layer are grey.

    Attributes:
        numbers: Distinct layers in ascending order.
        unnumbered: Whether some rows have no layer.
    """

    numbers: tuple[int, ...]
    unnumbered: bool

    @classmethod
    def of(cls, rows: pd.DataFrame) -> Layers:
        """The layers of a table's ``layer`` column."""
        known = rows["layer"].dropna()
        return cls(tuple(sorted({int(layer) for layer in known})), len(known) < len(rows))

    def colours(self, layers: pd.Series) -> list[str]:
        """The colour of each row."""
        table: Mapping[int, str] = layer_colours(self.numbers)
        return [NO_LAYER_COLOUR if pd.isna(one) else table[int(one)] for one in layers]

    def marker(self, layer: object) -> str:
        """The marker of a layer's line; none where layers are too many for a legend."""
        if len(self.numbers) > len(LAYER_MARKERS) or pd.isna(layer):  # type: ignore[call-overload]
            return ""
        return LAYER_MARKERS[self.numbers.index(int(layer))]  # type: ignore[call-overload]

    def handles(self, style: Style, *, lines: bool = False) -> list[Line2D]:
        """Legend entries, one per layer; none where there are too many layers for a legend."""
        entries = {str(layer): colour for layer, colour in layer_colours(self.numbers).items()}
        if len(self.numbers) > len(LAYER_COLOURS):
            entries = {}
        if self.unnumbered:
            entries["none" if entries else "no layer"] = NO_LAYER_COLOUR
        if lines:
            markers = dict(zip(map(str, self.numbers), LAYER_MARKERS, strict=False))
            return [
                Line2D([], [], color=colour, label=name, **line_marker(style, markers.get(name)))
                for name, colour in entries.items()
            ]
        return [dot(style, FINAL_MARKER, colour, name) for name, colour in entries.items()]


def line_marker(style: Style, marker: str | None) -> dict[str, Any]:
    """How a line carries a marker that tells it apart without its colour."""
    return {
        "marker": marker or "",
        "markersize": 0.85 * math.sqrt(style.marker_area),
        "markeredgecolor": "white",
        "markeredgewidth": 0.25 * style.line_width,
    }


def dot(style: Style, marker: str, colour: str, label: str, *, filled: bool = True) -> Line2D:
    """A legend entry that shows one point."""
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=math.sqrt(style.marker_area),
        markerfacecolor=colour if filled else "white",
        markeredgecolor="white" if filled else colour,
        markeredgewidth=0.3 if filled else 0.6 * style.line_width,
        label=label,
    )


def legends(
    figure: Figure,
    drawn: Sequence[Panel],
    layers: Layers,
    entries: Mapping[str, Sequence[Line2D]],
    *,
    style: Style,
    own_layout: bool,
) -> None:
    """Puts legends beside the panels, never over them, and a colour bar for many layers.

    Args:
        figure: The figure of all panels.
        drawn: Its panels.
        layers: What the colours mean; more than `LAYER_COLOURS` of them give a colour bar.
        entries: Title to entries; empty ones give no legend.
        style: That of the figure.
        own_layout: Whether the figure was made here and has a constrained layout. Axes given by
            the caller get their legends at the right of the last panel.
    """
    places = [_place(panel.axes) or (0, 0) for panel in drawn]
    shown = {title: list(handles) for title, handles in entries.items() if handles}
    across = own_layout and max(column for _, column in places) > 0
    most, corners = (_ONE_ROW, _LOWER) if across else (1, _RIGHT)
    if own_layout and style.most_columns == 1:
        most, corners = _IN_COLUMN, _LOWER
        shown = _together(shown)
    if len(layers.numbers) > len(LAYER_COLOURS):
        # One legend below the panels: the colour bar has the place beside them.
        most, corners = (most if across else 2), _LOWER
        together = [handle for handles in shown.values() for handle in handles]
        shown = {list(shown)[-1]: together} if together else {}
        scale = Normalize(layers.numbers[0], layers.numbers[-1])
        bar = figure.colorbar(
            ScalarMappable(scale, mpl.colormaps[LAYER_MAP]),
            ax=[panel.axes for panel in drawn],
            label="layer",
            aspect=22 * (1 + max(row for row, _ in places)),
            pad=0.02,
        )
        bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        bar.outline.set_visible(False)
    for number, (title, handles) in enumerate(shown.items()):
        if own_layout:
            made = figure.legend(
                handles=handles,
                title=title,
                loc=corners[number % 2],
                ncols=min(most, len(handles)),
                alignment="left",
                columnspacing=1.0,
                borderaxespad=0.3,
            )
        else:
            made = beside(drawn[-1].axes, handles, title, number)
        made.get_title().set_color(LINE_COLOUR)


def beside(axes: Axes, handles: Sequence[Line2D], title: str | None, number: int) -> Legend:
    """A legend at the right of the caller's axes: the first at the top, the second below."""
    made = Legend(
        axes,
        list(handles),
        [str(handle.get_label()) for handle in handles],
        title=title,
        loc="upper left" if number == 0 else "lower left",
        bbox_to_anchor=(1.02, 1.0 if number == 0 else 0.0),
        borderaxespad=0.0,
        alignment="left",
    )
    axes.add_artist(made)  # not `axes.legend`, which would replace the caller's own
    made.set_clip_on(False)  # part of what a tight layout keeps
    return made


def _together(entries: Mapping[str, Sequence[Line2D]]) -> dict[str, list[Line2D]]:
    """All entries in one legend, numbers with their title's name before them."""
    handles = []
    for title, ours in entries.items():
        for handle in ours:
            label = str(handle.get_label())
            handle.set_label(f"{title} {label}" if label.isdigit() else label)
            handles.append(handle)
    return {", ".join(entries): handles} if handles else {}
