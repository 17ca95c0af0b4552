"""A measure over the steps of training, one line per weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, get_args

from matplotlib.lines import Line2D

from dora_dynamics.errors import InputError
from dora_dynamics.plotting._figure import StyledFigure
from dora_dynamics.plotting._legends import Layers, legends, line_marker
from dora_dynamics.plotting._panels import Panel, label_outer, panels
from dora_dynamics.plotting._rows import checked, finite, in_order
from dora_dynamics.plotting._style import LINE_COLOUR, Style, StyleName, context, style_named
from dora_dynamics.shown_text import in_figure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = Literal[
    "delta_direction", "delta_magnitude", "signed_delta_magnitude", "relative_delta_magnitude"
]

_LABELS: Final[dict[str, str]] = {
    "delta_direction": "ΔD",
    "delta_magnitude": "ΔM",
    "signed_delta_magnitude": "signed ΔM",
    "relative_delta_magnitude": "ΔM / m₀",
}
_DASHES: Final = ("-", "--", ":", "-.")
_CROWDED: Final = 20
_MARKERS_A_LINE: Final = 6


def trajectories(
    trajectory: pd.DataFrame,
    measure: Measure = "delta_direction",
    *,
    by: str = "method",
    ax: Axes | Iterable[Axes] | np.ndarray | None = None,
    legend: bool = True,
    style: StyleName = "paper",
    title: str | None = None,
) -> Figure:
    """Draws a measure over the steps of training: a line per weight, a panel per method.

    FT, LoRA and DoRA come first; every role has a row of panels, with none where a method has no
    finite value of it. Colours and markers are layers,
    dashes are stacks. Lines of several runs (seeds) of one method are drawn alike but half
    transparent. Where the measure is NaN or infinite the line has a gap. The values are those of
    the table.

    Args:
        trajectory: Table of `dora_dynamics.trajectory`.
        measure: Column to draw, one of `Measure`.
        by: Column that has a panel per value.
        ax: Axes to draw into, as many as there are panels, role by role (one alone for one
            panel), or one for every method of every role, such as those of a seaborn FacetGrid;
            a new figure where None.
        legend: Draw the legends of layers and stacks.
        style: "paper", "column" (panels below each other) or "slide".
        title: Title of the figure.

    Returns:
        The figure, that of `ax` or a new one that is not registered with pyplot.

    Raises:
        InputError: The measure is unknown, the table is empty, lacks a column or has nothing finite
            to draw, or the axes are too few or too many.
    """
    look = style_named(style)
    if measure not in get_args(Measure):
        choices = ", ".join(map(repr, get_args(Measure)))
        raise InputError(f"measure {measure!r} is unknown; choose one of {choices}.")
    names = dict.fromkeys([by, "run", "role", "site", "stack"])
    rows = checked(trajectory, names, ["step", "layer", measure])
    if "head" in trajectory.columns:
        rows["head"] = trajectory["head"].astype(object).map(str).to_numpy()
    else:
        rows["head"] = ""
    place = rows.set_index(list(dict.fromkeys([by, "role"]))).index
    rows = rows[place.isin(place[finite(rows, ["step", measure]).index])]
    layers, stacks = Layers.of(rows), in_order(rows["stack"])
    unit = str(trajectory.attrs.get("axis", "output"))
    with context(look):
        figure, drawn = panels(rows, by, look, ax, order=trajectory)
        for panel in drawn:
            _lines(panel, measure, layers, stacks, look)
        label_outer(drawn, "step", f"{_LABELS[measure]} (mean over {unit} units)")
        dashes = [
            Line2D(
                [],
                [],
                color=LINE_COLOUR,
                linestyle=_DASHES[i % len(_DASHES)],
                label=in_figure(name),
            )
            for i, name in enumerate(stacks)
        ]
        if legend:
            entries = {
                "layer": layers.handles(look, lines=True),
                "stack": dashes if len(stacks) > 1 else [],
            }
            legends(figure, drawn, layers, entries, style=look, own_layout=ax is None)
        if title is not None:
            figure.suptitle(title)
        if isinstance(figure, StyledFigure):
            figure.alt = _in_words(drawn, measure, by)
    return figure


def _in_words(drawn: Sequence[Panel], measure: str, by: str) -> str:
    parts = []
    for panel in drawn:
        last = panel.rows[panel.rows["step"] == panel.rows["step"].max()][measure].dropna()
        if len(last):
            step = panel.rows["step"].max()
            span = f"{last.min():.3g} to {last.max():.3g}"
            parts.append(f"{panel.title}: {span} at step {step:,.0f}")
    return (
        f"Lines of {_LABELS[measure]} over the steps of training, a panel per {by}, a line per "
        f"weight. {'; '.join(parts)}."
    )


def _lines(panel: Panel, measure: str, layers: Layers, stacks: list[str], style: Style) -> None:
    panel.axes.set_title(in_figure(panel.title))
    alpha = 0.5 if panel.rows["run"].nunique() > 1 else 0.9
    groups = panel.rows.groupby(["run", "stack", "site", "head"], sort=False)
    width = style.line_width * min(1.0, max(0.4, math.sqrt(_CROWDED / max(groups.ngroups, 1))))
    for _, line in groups:
        line = line.sort_values("step")
        panel.axes.plot(
            line["step"],
            line[measure],
            color=layers.colours(line["layer"])[0],
            linestyle=_DASHES[stacks.index(line["stack"].iloc[0]) % len(_DASHES)],
            alpha=alpha,
            linewidth=width,
            markevery=max(1, len(line) // _MARKERS_A_LINE),
            **line_marker(style, layers.marker(line["layer"].iloc[0])),
        )
    panel.axes.locator_params(nbins=5)
    panel.axes.locator_params("x", integer=True)
