"""Why LoRA's points lie on a line: an update orthogonal to w_0 ties ΔM to ΔD."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

import dora_dynamics as dd
from analyses.teaching import look, small_model
from analyses.teaching.look import DIRECTION, INK, MAGNITUDE, QUIET, signed
from analyses.teaching.picture import Picture
from dora_dynamics.plotting import METHOD_COLOURS, METHOD_MARKERS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from dora_dynamics.plotting import StyledFigure, StyleName

BEFORE: Final = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
UPDATE: Final = torch.tensor([[0.0, 1.5]], dtype=torch.float64)


@cache
def measured() -> pd.DataFrame:
    """Four records of twelve weights that LoRA trains."""
    table, _ = small_model.train("LoRA", steps=40, learning_rate=8e-3)
    return table[table["step"] > 0]


def _coupling() -> pd.Series:
    return dd.coupling(measured(), by="method", level="pooled", permutations=0).iloc[0]


def picture() -> Picture:
    """The figure with its words."""
    change = dd.weight_change(BEFORE, BEFORE + UPDATE)
    r = signed(float(_coupling()["pearson"]))
    share = f"{100 * measured()['radial_share'].mean():.1f}%"
    count = small_model.LAYERS
    caption = (
        "An update BA that is orthogonal to a weight vector w₀ makes a right triangle (a): the "
        "vector can only grow, and by an amount that the angle fixes: ΔM = m₀ · ΔD/(1 − ΔD), a "
        f"curve through the origin, and almost a straight line of slope m₀. Here m₀ = 2, ‖BA‖ = "
        f"1.5, ΔD = {change.delta_direction:.2f} and ΔM = {change.delta_magnitude:.2f}. Low-rank "
        "updates of high-dimensional weights nearly are orthogonal to them: (b) shows "
        f"{count} small weights trained with LoRA, each at four checkpoints. On average {share} of "
        "the squared update lies along w₀, the points follow the curves of their m₀, and pooled "
        f"r = {r}. LoRA's positive slope is geometry, not a choice of the training."
    )
    alt = (
        "Two panels. First: w₀ of length 2 along the horizontal, an update of length 1.5 at a "
        "right angle to it, and w′ of length 2.5 as the hypotenuse; the piece by which w′ is "
        f"longer is marked {change.delta_magnitude:.2f}. Second: ΔM against ΔD of {4 * count} "
        "measured points, which rise together between the two curves ΔM = m₀ ΔD/(1 − ΔD) for the "
        f"smallest and the largest m₀; r = {r}."
    )
    title = "Why LoRA's points lie on a line"
    return Picture("orthogonal_update", title, caption, alt, draw)


def draw(style: StyleName) -> StyledFigure:
    """Two panels: the right triangle, and measured points with its curve."""
    figure, _ = look.figure(style, slide=5.6, column=5.6)
    with figure.drawing():
        if style == "slide":
            triangle, points = figure.subplots(1, 2)
        else:
            triangle, points = figure.subplots(2, 1, height_ratios=[1, 1.1])
        _triangle(triangle)
        _points(points)
    return figure


def _triangle(axes: Axes) -> None:
    w, after = BEFORE[0].numpy(), (BEFORE + UPDATE)[0].numpy()
    change = dd.weight_change(BEFORE, BEFORE + UPDATE)
    m, m_after = (
        float(each[0]) for each in (change.units.magnitude_before, change.units.magnitude_after)
    )
    angle = float(np.arctan2(after[1], after[0]))
    look.panel_title(axes, "a", "an update orthogonal to the weight")
    look.plane(axes, (-0.15, 2.75), (-0.62, 2.0))
    look.arrow(axes, (0, 0), w, INK)
    look.arrow(axes, w, after, METHOD_COLOURS["LoRA"])
    on_arc = m * after / m_after
    look.segment(axes, (0, 0), on_arc, INK)
    look.arrow(axes, on_arc, after, MAGNITUDE, linewidth=3.2 * look.weight(axes), zorder=6)
    look.arc(axes, m, 0, angle, MAGNITUDE, linestyle="--")
    look.right_angle(axes, w, (0, 0), after, 0.12)
    look.arc(axes, 0.45, 0, angle, DIRECTION)
    look.label(axes, (0.62, 0.2), r"$\theta$", DIRECTION)
    look.label(axes, (0.95, -0.14), rf"$m_0 = \Vert w_0 \Vert$ = {m:.1f}", INK)
    text = r"$BA$ ⊥ $w_0$" + f"\nlength {float(UPDATE.norm()):.1f}"
    look.label(axes, (2.08, 0.6), text, METHOD_COLOURS["LoRA"], ha="left")
    text = r"$m′ = (m_0^2 + \Vert BA \Vert^2)^{1/2}$" + f" = {m_after:.1f}"
    look.label(axes, (0.62, 0.72), text, INK, rotation=np.degrees(angle), rotation_mode="anchor")
    text = rf"$\Delta M = m′ - m_0$ = {change.delta_magnitude:.2f}"
    look.label(axes, (1.62, 1.62), text, MAGNITUDE, ha="right")
    text = rf"$\Delta D$ = 1 − $m_0/m′$ = {change.delta_direction:.2f}"
    look.label(axes, (0.0, -0.36), text, DIRECTION, ha="left")
    text = r"so that $\Delta M = m_0 \cdot \Delta D/(\mathrm{1} - \Delta D)$"
    look.label(axes, (0.0, -0.58), text, INK, ha="left")


def _points(axes: Axes) -> None:
    table = measured()
    look.panel_title(axes, "b", f"{small_model.LAYERS} weights trained with LoRA")
    x = np.linspace(0, 1.12 * table["delta_direction"].max(), 100)
    smallest, largest = table["magnitude_before"].min(), table["magnitude_before"].max()
    for m in (smallest, largest):
        axes.plot(x, m * x / (1 - x), color=QUIET, linestyle="--", zorder=1)
    axes.scatter(
        table["delta_direction"],
        table["delta_magnitude"],
        marker=METHOD_MARKERS["LoRA"],
        color=METHOD_COLOURS["LoRA"],
        s=(0.75 * float(axes.title.get_fontsize())) ** 2 / 2,
        edgecolors="white",
        linewidths=0.3,
        zorder=2,
    )
    look.from_zero(axes, float(x[-1]), 1.45 * float(table["delta_magnitude"].max()))
    for m, where, side in ((largest, 0.42, "right"), (smallest, 0.76, "left")):
        at = where * x[-1]
        look.label(
            axes,
            (at, m * at / (1 - at)),
            rf" $m_0$ = {m:.1f} ",
            QUIET,
            ha=side,
            va="bottom" if side == "right" else "top",
        )
    found = _coupling()
    text = (
        f"r = {signed(float(found['pearson']))}, n = {found['n']:.0f}\n"
        f"along $w_0$: {100 * table['radial_share'].mean():.1f}% of the update"
    )
    look.words(axes, text)
