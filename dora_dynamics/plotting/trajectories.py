"""A measure over the steps of training, one line per weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, get_args

from matplotlib.lines import Line2D

from dora_dynamics.plotting._panels import (
    Layers,
    Panel,
    checked,
    finite,
    in_order,
    label_outer,
    legends,
    panels,
)
from dora_dynamics.plotting._style import LINE_COLOUR, Style, StyleName, context, style_named

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def trajectories(
    trajectory: pd.DataFrame,
    measure: Measure = "delta_direction",
    *,
    by: str = "method",
    axes: Axes | Sequence[Axes] | np.ndarray | None = None,
    style: StyleName = "paper",
    title: str | None = None,
) -> Figure:
    """Draws a measure over the steps of training: a line per weight, a panel per method.

    FT, LoRA and DoRA come first; every role has a row of panels. Colours are layers, dashes are
    stacks. Lines of several runs (seeds) of one method are drawn alike but half transparent. Where
    the measure is NaN or infinite the line has a gap. The values are those of the table.

    Args:
        trajectory: Table of `dora_dynamics.trajectory`.
        measure: Column to draw, one of `Measure`.
        by: Column that has a panel per value.
        axes: As many axes as there are panels, role by role, to draw into; else a new figure.
        style: "paper" or "slide".
        title: Title of the figure.

    Returns:
        The figure, not registered with pyplot.

    Raises:
        ValueError: The measure is unknown, the table is empty, lacks a column or has nothing finite
            to draw, or `axes` are too few or too many.
    """
    look = style_named(style)
    if measure not in get_args(Measure):
        choices = ", ".join(map(repr, get_args(Measure)))
        raise ValueError(f"measure {measure!r} is unknown; choose one of {choices}.")
    names = dict.fromkeys([by, "run", "role", "site", "stack"])
    rows = checked(trajectory, names, ["step", "layer", measure])
    if "head" in trajectory.columns:
        rows["head"] = trajectory["head"].astype(object).map(str).to_numpy()
    else:
        rows["head"] = ""
    finite(rows, ["step", measure])
    layers, stacks = Layers.of(rows), in_order(rows["stack"])
    unit = str(trajectory.attrs.get("axis", "output"))
    with context(look):
        figure, drawn = panels(rows, by, look, axes)
        for panel in drawn:
            _lines(panel, measure, layers, stacks, look)
        label_outer(drawn, "step", f"{_LABELS[measure]} (mean over {unit} units)")
        dashes = [
            Line2D([], [], color=LINE_COLOUR, linestyle=_DASHES[i % len(_DASHES)], label=name)
            for i, name in enumerate(stacks)
        ]
        entries = {
            "layer": layers.handles(look, lines=True),
            "stack": dashes if len(stacks) > 1 else [],
        }
        legends(figure, drawn, layers, entries, own_layout=axes is None)
        if title is not None:
            figure.suptitle(title)
    return figure


def _lines(panel: Panel, measure: str, layers: Layers, stacks: list[str], style: Style) -> None:
    panel.axes.set_title(panel.title)
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
        )
    panel.axes.locator_params(nbins=5)
