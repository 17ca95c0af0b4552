"""Colours, markers and legends of layers, beside a grid of panels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import matplotlib as mpl
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

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
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dora_dynamics.plotting._panels import Panel

_ONE_ROW: Final = 20
_IN_COLUMN: Final = 3
_Corner: TypeAlias = Literal[
    "outside lower left", "outside lower right", "outside right upper", "outside right lower"
]
_LOWER: Final[tuple[_Corner, _Corner]] = ("outside lower left", "outside lower right")
_RIGHT: Final[tuple[_Corner, _Corner]] = ("outside right upper", "outside right lower")


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
    places = [panel.place or (0, 0) for panel in drawn]
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
