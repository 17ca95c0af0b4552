"""What weight decay does to ΔM: the same update with and without it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

import dora_dynamics as dd
from analyses.teaching import look, small_model
from analyses.teaching.look import INK, MAGNITUDE, QUIET, signed
from analyses.teaching.picture import Picture
from dora_dynamics.correlation import pearson, slope
from dora_dynamics.plotting import METHOD_COLOURS, METHOD_MARKERS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from dora_dynamics.plotting import StyledFigure, StyleName

BEFORE: Final = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
UPDATE: Final = torch.tensor([[-0.2, 0.8]], dtype=torch.float64)
DRAWN_DECAY: Final = 0.25
TOTAL_DECAY: Final = 0.12


@cache
def measured() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Twelve fully fine-tuned weights at the end: without decay, and the same updates with it."""
    without, gradients = small_model.train("FT", steps=40, learning_rate=1.2e-3)
    decayed, _ = small_model.train(
        "FT", steps=40, learning_rate=1.2e-3, total_decay=TOTAL_DECAY, gradients=gradients
    )
    last = without["step"].max()
    return without[without["step"] == last], decayed[decayed["step"] == last]


def _r(table: pd.DataFrame) -> float:
    return pearson(table["delta_direction"].to_numpy(), table["delta_magnitude"].to_numpy())


def picture() -> Picture:
    """The figure with its words."""
    without, decayed = measured()
    one, other = (signed(_r(table)) for table in (without, decayed))
    shrunk = int((decayed["signed_delta_magnitude"] < 0).sum())
    caption = (
        "AdamW's weight decay multiplies W by a number below 1 at every step; over a run it takes "
        "the share Λ = Σ lr · weight decay of each weight, along the weight itself. It hardly "
        "changes the direction, but it pulls the magnitude down (a): to first order m′ − m₀ = "
        f"m₀(ΔD/(1 − ΔD) − Λ). In (b) and (c) the same {len(without)} weights get the very same "
        f"gradients, without decay and with Λ = {TOTAL_DECAY:g}. Without it the weights grow, "
        f"those that turn more by more: r = {one} across the weights. With it {shrunk} of "
        f"{len(decayed)} shrink, and since what decay takes is in proportion to m₀ while large "
        f"weights (large dots) turn less, the coupling of ΔM = |m′ − m₀| and ΔD is r = {other}. "
        "Dotted: |m₀(ΔD/(1 − ΔD) − Λ)|. Full fine-tuning decays W and DoRA decays m, but LoRA "
        "decays only A and B, never W₀."
    )
    alt = (
        "Three panels. First: w₀, the update and the longer w′ without decay; the same update from "
        "the shrunk (1 − Λ)w₀ ends at a shorter w′. Second: ΔM against ΔD of "
        f"{len(without)} weights without decay, r = {one}. Third: the same weights with decay, "
        f"r = {other}, on the falling curve m₀(Λ − ΔD/(1 − ΔD))."
    )
    return Picture("weight_decay", "What weight decay does to ΔM", caption, alt, draw)


def draw(style: StyleName) -> StyledFigure:
    """Three panels: the vectors, and measured points without and with decay."""
    figure, _ = look.figure(style, slide=5.2, column=7.2)
    with figure.drawing():
        if style == "slide":
            vectors, one, other = figure.subplots(1, 3, width_ratios=[1.15, 1, 1])
        else:
            vectors, one, other = figure.subplots(3, 1, height_ratios=[1.05, 1, 1])
        _vectors(vectors)
        without, decayed = measured()
        look.panel_title(one, "b", "without decay")
        _points(one, without, 0.0)
        look.panel_title(other, "c", rf"with $\Lambda$ = {TOTAL_DECAY:g}")
        _points(other, decayed, TOTAL_DECAY)
        other.set_ylabel(r"$\Delta M$" if style == "column" else "")
        if style == "column":
            one.set_xlabel("")
    return figure


def _vectors(axes: Axes) -> None:
    colour = METHOD_COLOURS["FT"]
    w, update = BEFORE[0].numpy(), UPDATE[0].numpy()
    kept = (1 - DRAWN_DECAY) * w
    both = {
        "without": dd.weight_change(BEFORE, BEFORE + UPDATE),
        "with": dd.weight_change(BEFORE, (1 - DRAWN_DECAY) * BEFORE + UPDATE),
    }
    m = both["with"].magnitude_before
    start, end = -0.1, float(np.arctan2(*(kept + update)[::-1])) + 0.15
    look.panel_title(axes, "a", "one update, twice")
    look.plane(axes, (-0.1, 2.65), (-1.05, 2.0))
    look.arc(axes, m, start, end, MAGNITUDE, linestyle="--")
    top = m * np.array([np.cos(end), np.sin(end)])
    look.label(axes, top, r"radius $m_0$", MAGNITUDE, ha="left", shift=(0.08, 0.04))
    look.arrow(axes, (0, 0), w, INK)
    look.arrow(axes, w, w + update, colour)
    look.arrow(axes, (0, 0), w + update, INK, linestyle="-", zorder=2)
    below = 0.09 * np.array([w[1], -w[0]]) / np.linalg.norm(w)
    look.arrow(axes, w + below, kept + below, QUIET, zorder=4)
    look.arrow(axes, kept, kept + update, colour)
    look.arrow(axes, (0, 0), kept + update, INK)
    look.label(axes, w, r"$w_0$", ha="left", shift=(0.08, -0.05))
    look.label(axes, w + update, r"$w′$", ha="left", shift=(0.05, 0.1))
    look.label(axes, kept + update, r"$w′$ with decay", ha="right", shift=(-0.06, 0.12))
    look.label(axes, kept, r"$-\Lambda w_0$", QUIET, shift=(0.05, -0.28))
    lines = [
        rf"{name} decay: $m′ - m_0$ = {signed(change.signed_delta_magnitude)}"
        for name, change in both.items()
    ]
    turned = [f"{change.delta_direction:.3f}" for change in both.values()]
    look.label(axes, (-0.05, -0.42), "\n".join(lines), MAGNITUDE, ha="left")
    text = rf"$\Delta D$ = {turned[0]} and {turned[1]}" + "\n" + rf"($\Lambda$ = {DRAWN_DECAY:g})"
    look.label(axes, (-0.05, -0.88), text, look.DIRECTION, ha="left")


def _points(axes: Axes, table: pd.DataFrame, decay: float) -> None:
    x, y, m = (
        table[name].to_numpy(dtype=np.float64)
        for name in ("delta_direction", "delta_magnitude", "magnitude_before")
    )
    axes.scatter(
        x,
        y,
        s=m**2 * (0.55 * float(axes.title.get_fontsize())) ** 2,
        marker=METHOD_MARKERS["FT"],
        color=METHOD_COLOURS["FT"],
        edgecolors="white",
        linewidths=0.3,
        zorder=3,
    )
    ends = np.array([x.min(), x.max()])
    axes.plot(ends, y.mean() + slope(x, y) * (ends - x.mean()), color=INK, zorder=4)
    predicted = np.abs(m * (x / (1 - x) - decay))
    order = np.argsort(x)
    axes.plot(x[order], predicted[order], color=QUIET, linestyle=":", zorder=2)
    look.from_zero(axes, 1.1 * x.max(), 1.5 * y.max())
    side = "grew" if decay == 0 else "shrank"
    count = int((np.sign(table["signed_delta_magnitude"]) == (1 if decay == 0 else -1)).sum())
    text = f"r = {signed(_r(table))}, n = {len(x)}\n{count} of {len(x)} weights {side}"
    look.words(axes, text)
