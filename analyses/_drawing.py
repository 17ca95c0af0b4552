"""What the study's figures share: colours and markers of methods, panels in the package's style."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from dora_dynamics.plotting import METHOD_COLOURS as METHOD_COLOURS
from dora_dynamics.plotting import METHOD_MARKERS as METHOD_MARKERS
from dora_dynamics.plotting._style import LINE_COLOUR, context, style_named

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


@contextmanager
def panels(
    rows: int, columns: int, *, height: float | None = None, width: float | None = None, **axes: Any
) -> Iterator[tuple[Figure, NDArray[Any]]]:
    """A figure of text width with rows × columns panels, drawn in the paper style inside."""
    style = style_named("paper")
    with context(style):
        size = (width or style.text_width, height or style.panel_height * rows + 0.35)
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **axes)


def with_interval(
    axes: Axes,
    x: NDArray[np.float64],
    table: pd.DataFrame,
    name: str,
    method: str,
    *,
    colour: str | None = None,
    marker: str | None = None,
    label: str | None = None,
    line: bool = True,
    **looks: Any,
) -> None:
    """Points of an estimate with intervals, joined by a line, in a method's looks or given ones."""
    colour = colour or METHOD_COLOURS.get(method, LINE_COLOUR)
    y, low, high = (table[column].to_numpy(float) for column in _bounds(name))
    axes.vlines(x, low, high, color=colour, linewidth=0.9)
    style = (marker or METHOD_MARKERS.get(method, "D")) + ("-" if line else "")
    axes.plot(x, y, style, color=colour, markersize=4, label=label or method, **looks)


def _bounds(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def zero_line(axes: Axes) -> None:
    """A line at zero, where a sign changes."""
    axes.axhline(0, color=LINE_COLOUR, linewidth=0.7, zorder=1)


def legend_below(figure: Figure, axes: Axes, columns: int = 6) -> None:
    """One legend for all panels, from one of them, below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
