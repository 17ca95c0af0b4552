"""A weight vector as magnitude and direction (Eq. 2), and what ΔM and ΔD are (Eq. 3 and 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import dora_dynamics as dd
from analyses.teaching import look
from analyses.teaching.look import DIRECTION, INK, MAGNITUDE, QUIET, plain
from analyses.teaching.picture import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dora_dynamics import WeightChange
    from dora_dynamics.plotting import StyledFigure, StyleName

BEFORE = torch.tensor(
    [[1.92, 0.56], [0.50, 1.20], [-1.05, 0.36], [0.64, -0.48]], dtype=torch.float64
)
AFTER = torch.tensor(
    [[1.44, 1.92], [0.65, 1.56], [-0.98, 0.84], [0.40, -0.96]], dtype=torch.float64
)
"""Four output units of two inputs each; the first is the one that is drawn."""


def picture() -> Picture:
    """The figure with its words."""
    change = dd.weight_change(BEFORE, AFTER)
    before, after = (float(m[0]) for m in (_magnitudes(change)))
    turned = float(change.units.one_minus_cosine[0])
    caption = (
        "A weight vector has a length, its magnitude m, and a direction V/‖V‖ of length 1 (a, "
        "Eq. 2 of the DoRA paper). Fine-tuning turns w₀ into w′ (b): the magnitude changes by "
        f"|m′ − m₀| = |{plain(after)} − {plain(before)}| = {plain(abs(after - before))}, the "
        f"direction by 1 − cos θ = {plain(turned)} (0 for the same direction, 1 for a right "
        "angle, 2 for the opposite one). A weight matrix has one such vector for each output unit; "
        "ΔM and ΔD are the means over all of them (c, Eq. 3 and 4): here "
        f"ΔM = {plain(change.delta_magnitude, 3)} and ΔD = {plain(change.delta_direction, 3)}."
    )
    alt = (
        "Three panels. First: an arrow w₀ from the origin, its length marked m₀ = "
        f"{plain(before)}, and along it an arrow of length 1, its direction. Second: w₀ and the "
        f"longer w′ = {plain(after)} at an angle θ; an arc of radius m₀ cuts w′, and the piece "
        f"beyond it is the change in magnitude, {plain(abs(after - before))}; on w₀, the piece "
        f"between cos θ and 1 is the change in direction, {plain(turned)}. Third: a table of four "
        "units with their magnitudes before and after, both changes, and the means ΔM = "
        f"{plain(change.delta_magnitude, 3)} and ΔD = {plain(change.delta_direction, 3)}."
    )
    return Picture("vectors", "Magnitude and direction, and what ΔM and ΔD are", caption, alt, draw)


def draw(style: StyleName) -> StyledFigure:
    """Three panels: a vector taken apart, its change, and the mean over a matrix."""
    change = dd.weight_change(BEFORE, AFTER)
    figure, _ = look.figure(style, slide=7.2, column=6.3)
    with figure.drawing():
        if style == "slide":
            grid = figure.add_gridspec(2, 2, height_ratios=[1.55, 1])
            places = [grid[0, 0], grid[0, 1], grid[1, :]]
        else:
            grid = figure.add_gridspec(3, 1, height_ratios=[1.0, 1.45, 0.85])
            places = [grid[0], grid[1], grid[2]]
        apart, changed, table = (figure.add_subplot(place) for place in places)
        _apart(apart, change)
        _changed(changed, change)
        _table(table, change)
    return figure


def _magnitudes(change: WeightChange) -> tuple[np.ndarray, np.ndarray]:
    return change.units.magnitude_before, change.units.magnitude_after


def _apart(axes: Axes, change: WeightChange) -> None:
    w = BEFORE[0].numpy()
    m = float(change.units.magnitude_before[0])
    v = dd.direction(BEFORE)[0].numpy()
    across = np.array([-v[1], v[0]])
    look.panel_title(axes, "a", "a vector taken apart (Eq. 2)")
    look.plane(axes, (-0.25, 3.35), (-0.45, 1.55))
    look.arc(axes, 1, -0.3, 0.42, DIRECTION, linestyle=":")
    look.arrow(axes, (0, 0), w, INK)
    look.arrow(axes, (0, 0), v, DIRECTION, zorder=4)
    low, high = 0.22 * across, w + 0.22 * across
    look.arrow(axes, low, high, MAGNITUDE, arrowstyle="|-|,widthA=0.2,widthB=0.2")
    look.label(axes, w * 1.04, r"$w_0$", ha="left")
    where = 0.64 * w + 0.46 * across
    turn = float(np.degrees(np.arctan2(w[1], w[0])))
    text = rf"$m_0 = \Vert w_0 \Vert$ = {m:.2f}"
    look.label(axes, where, text, MAGNITUDE, rotation=turn, rotation_mode="anchor")
    numbers = ", ".join(plain(part) for part in v)
    text = rf"$V/\Vert V \Vert_c$ = ({numbers})" + "\nlength 1"
    look.label(axes, (1.12, 0.06), text, DIRECTION, ha="left", va="top")
    text = r"$w_0 = m_0 \cdot V/\Vert V \Vert_c$"
    look.label(axes, (0.55, 1.36), text, ha="left")


def _changed(axes: Axes, change: WeightChange) -> None:
    w, after = BEFORE[0].numpy(), AFTER[0].numpy()
    m, m_after = (float(each[0]) for each in _magnitudes(change))
    turned = float(change.units.one_minus_cosine[0])
    v, v_after = (dd.direction(weight)[0].numpy() for weight in (BEFORE, AFTER))
    start, end = (float(np.arctan2(each[1], each[0])) for each in (w, after))
    foot = (1 - turned) * v
    look.panel_title(axes, "b", "its change (Eq. 3 and 4)")
    look.plane(axes, (-0.25, 3.35), (-0.2, 2.2))
    look.arrow(axes, (0, 0), w, INK)
    look.segment(axes, (0, 0), m * v_after, INK)
    look.arrow(axes, m * v_after, after, MAGNITUDE, linewidth=3.2 * look.weight(axes), zorder=6)
    look.label(axes, w * 1.04, r"$w_0$", ha="left")
    look.label(axes, after * 1.06, r"$w′$")
    look.arc(axes, m, start, end, MAGNITUDE, linestyle="--")
    look.arc(axes, 1, start, end, DIRECTION, linestyle=":")
    look.segment(axes, foot, v, DIRECTION, weight=3.2, zorder=6)
    look.segment(axes, v_after, foot, QUIET, weight=0.6, linestyle="-")
    look.right_angle(axes, foot, v_after, (0, 0), 0.07)
    look.arc(axes, 0.36, start, end, INK)
    middle = (start + end) / 2
    look.label(axes, 0.52 * np.array([np.cos(middle), np.sin(middle)]), r"$\theta$")
    text = rf"$|m′ - m_0|$ = |{m_after:.2f} − {m:.2f}| = {abs(m_after - m):.2f}"
    look.label(axes, (1.50, 1.76), text, MAGNITUDE, ha="left")
    text = rf"1 − cos $\theta$ = 1 − {1 - turned:.2f} = {turned:.2f}"
    look.label(axes, (1.0, 0.07), text, DIRECTION, ha="left", va="center")


def _table(axes: Axes, change: WeightChange) -> None:
    look.panel_title(axes, "c", "a matrix: the mean over its output units")
    axes.set_axis_off()
    heads = ["unit", r"$m_0$", r"$m′$", r"$|m′ - m_0|$", r"1 − cos $\theta$"]
    before, after = _magnitudes(change)
    moved, turned = np.abs(change.units.magnitude_difference), change.units.one_minus_cosine
    rows = [
        [str(n + 1), f"{before[n]:.2f}", f"{after[n]:.2f}", f"{moved[n]:.2f}", f"{turned[n]:.3f}"]
        for n in range(len(change.units))
    ]
    rows[0][0] += " (above)"
    delta_m, delta_d = change.delta_magnitude, change.delta_direction
    rows.append(["mean", "", "", rf"$\Delta M$ = {delta_m:.3f}", rf"$\Delta D$ = {delta_d:.3f}"])
    places = [0.10, 0.29, 0.44, 0.66, 0.90]
    colours = [INK, INK, INK, MAGNITUDE, DIRECTION]
    lines = np.linspace(0.92, 0.06, len(rows) + 1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for y, row in zip(lines, [heads, *rows], strict=True):
        for x, text, colour in zip(places, row, colours, strict=True):
            look.label(axes, (x, y), text, colour if row is not heads or x > 0.5 else QUIET)
    for y in ((lines[0] + lines[1]) / 2, (lines[-1] + lines[-2]) / 2):
        look.segment(axes, (0.02, y), (0.99, y), QUIET, weight=0.5)
