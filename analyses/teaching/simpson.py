"""The paper's Figure 2 read step by step: pooled against within-checkpoint correlation.

Simpson's paradox with the paper's own points of full fine-tuning: every weight's path rises, all
points together fall. What holds within a checkpoint depends on which point is which, and there are
two readings (`dora_dynamics.paper.published_points`): both are shown, each by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from analyses.teaching import look
from analyses.teaching.look import INK, signed
from analyses.teaching.picture import Picture
from dora_dynamics.correlation import pearson, slope
from dora_dynamics.paper import published_points
from dora_dynamics.plotting import METHOD_COLOURS, METHOD_MARKERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from matplotlib.axes import Axes

    from dora_dynamics.plotting import StyledFigure, StyleName

Labels = Literal["printed", "reordered"]

METHODS: Final = ("FT", "LoRA", "DoRA")
STEPS: Final = {1: ("#93B5DA", "^"), 2: ("#5B8FC7", "s"), 3: ("#2563A3", "D"), 4: ("#08306B", "o")}
"""Colour and marker of each checkpoint: darker is later."""


def points(method: str, labels: Labels = "printed") -> pd.DataFrame:
    """The paper's points of one method's query matrices."""
    table = published_points(labels)
    return table[(table["method"] == method) & (table["role"] == "query")]


def r(table: pd.DataFrame) -> float:
    """Pearson's r of ΔD and ΔM over some points."""
    return pearson(table["delta_direction"].to_numpy(), table["delta_magnitude"].to_numpy())


def within(method: str, labels: Labels, by: Literal["step", "site"]) -> list[float]:
    """Pearson's r within each checkpoint (across layers) or along each weight's path."""
    return [r(part) for _, part in points(method, labels).groupby(by)]


def _span(values: list[float]) -> str:
    low, high = signed(min(values)), signed(max(values))
    return low if low == high else f"{low} to {high}"


def picture() -> Picture:
    """The figure with its words."""
    pooled = {method: signed(r(points(method))) for method in METHODS}
    printed, reordered = (within("FT", labels, "step") for labels in ("printed", "reordered"))
    paths = within("FT", "reordered", "site")
    dora = within("DoRA", "printed", "step")
    caption = (
        "All 48 query points of full fine-tuning in the DoRA paper's Figure 2 (a): pooled, ΔM "
        f"falls with ΔD, r = {pooled['FT']}. The points mix 12 weights at 4 checkpoints (darker is "
        "later), and which point is which is not certain. With the labels as printed (b), r across "
        f"the weights of one checkpoint is {', '.join(map(signed, printed))}. The order in which "
        "the points are drawn suggests other labels, a conjecture of this project; with them (c) "
        f"every checkpoint falls, r = {_span(reordered)}, and (d) every weight rises as training "
        f"goes on, r = {_span(paths)} along its path. That is Simpson's paradox: what holds along "
        "every weight turns round when the weights are pooled, because those whose direction "
        "changes more are others than those whose magnitude changes more. (e) shows every r for "
        f"all methods: pooled r (FT {pooled['FT']}, LoRA {pooled['LoRA']}, DoRA {pooled['DoRA']}) "
        "does not depend on the labels, r within a checkpoint does (DoRA as printed: "
        f"{_span(dora)}). Say which one you mean."
    )
    alt = (
        "Five panels with the same 48 points, ΔM against ΔD of FT's query matrices. (a) all in one "
        f"colour with a falling line, r = {pooled['FT']}. (b) in four shades for the checkpoints, "
        f"labels as printed, four lines with r = {', '.join(map(signed, printed))}. (c) the same "
        f"with the labels reordered: four falling lines, r = {_span(reordered)}. (d) twelve paths "
        f"of weights, all rising to the upper right, r = {_span(paths)}. (e) for FT, LoRA and "
        "DoRA, r pooled, within checkpoints by both labellings, and along the weights' paths, as "
        "dots between −1 and +1."
    )
    title = "The paper's Figure 2 read step by step"
    return Picture("simpson", title, caption, alt, draw)


def draw(style: StyleName) -> StyledFigure:
    """Five panels: the points pooled, by checkpoint (twice), by weight, and all r together."""
    figure, _ = look.figure(style, slide=7.6, column=8.7)
    with figure.drawing():
        if style == "slide":
            rows = figure.add_gridspec(2, 1)
            above, below = rows[0].subgridspec(1, 3), rows[1].subgridspec(1, 2, width_ratios=[1, 2])
            places = [above[0], above[1], above[2], below[0], below[1]]
        else:
            rows = figure.add_gridspec(3, 1, height_ratios=[1, 1, 1.0])
            above, middle = (rows[i].subgridspec(1, 2) for i in (0, 1))
            places = [above[0], above[1], middle[0], middle[1], rows[2]]
        axes = [figure.add_subplot(place) for place in places]
        narrow = style == "column"
        _pooled(axes[0])
        _by_checkpoint(axes[1], "b", "printed", narrow)
        _by_checkpoint(axes[2], "c", "reordered", narrow)
        _by_weight(axes[3])
        _all_methods(axes[4], narrow)
        first = (0, 2) if narrow else (0, 3)
        for number, one in enumerate(axes[:4]):
            one.set_xlabel(r"$\Delta D$")
            one.tick_params(labelleft=number in first)
            one.set_ylabel(r"$\Delta M$" if number in first else "")
    return figure


def _frame(axes: Axes, letter: str, title: str, text: str) -> None:
    table = points("FT")
    x, y = table["delta_direction"], table["delta_magnitude"]
    axes.set_xlim(x.min() - 0.06 * np.ptp(x), x.max() + 0.06 * np.ptp(x))
    axes.set_ylim(y.min() - 0.08 * np.ptp(y), y.max() + 0.4 * np.ptp(y))
    axes.locator_params(nbins=3)
    look.panel_title(axes, letter, title)
    look.words(axes, text)


def _size(axes: Axes) -> float:
    return (0.42 * float(axes.title.get_fontsize())) ** 2


def _line(axes: Axes, part: pd.DataFrame, colour: str) -> None:
    x, y = part["delta_direction"].to_numpy(), part["delta_magnitude"].to_numpy()
    ends = np.array([x.min(), x.max()])
    axes.plot(ends, y.mean() + slope(x, y) * (ends - x.mean()), color=colour, zorder=3)


def _dots(axes: Axes, part: pd.DataFrame, colour: str, marker: str) -> None:
    axes.scatter(
        part["delta_direction"],
        part["delta_magnitude"],
        color=colour,
        marker=marker,
        s=_size(axes),
        edgecolors="white",
        linewidths=0.3,
        zorder=2,
    )


def _pooled(axes: Axes) -> None:
    table = points("FT")
    _frame(axes, "a", "FT, all points", f"pooled:\nr = {signed(r(table))}")
    _dots(axes, table, METHOD_COLOURS["FT"], METHOD_MARKERS["FT"])
    _line(axes, table, INK)


def _by_checkpoint(axes: Axes, letter: str, labels: Labels, narrow: bool) -> None:
    found = list(map(signed, within("FT", labels, "step")))
    text = "by checkpoint: r =\n" + ", ".join(found)
    if narrow:
        text = "r = " + ", ".join(found[:2]) + ",\n" + ", ".join(found[2:])
    title = "labels as printed" if labels == "printed" else "labels reordered"
    _frame(axes, letter, title, text)
    for step, part in points("FT", labels).groupby("step"):
        colour, marker = STEPS[int(str(step))]
        _dots(axes, part, colour, marker)
        _line(axes, part, colour)


def _paths() -> Iterator[pd.DataFrame]:
    for _, part in points("FT", "reordered").groupby("site"):
        yield part.sort_values("step")


def _by_weight(axes: Axes) -> None:
    found = within("FT", "reordered", "site")
    _frame(axes, "d", "paths, reordered", f"12 weights:\nr = {_span(found)}")
    for part in _paths():
        x, y = part["delta_direction"].to_numpy(), part["delta_magnitude"].to_numpy()
        axes.plot(x, y, color=METHOD_COLOURS["FT"], linewidth=0.7 * look.weight(axes), zorder=1)
        axes.scatter(
            x,
            y,
            c=[STEPS[int(step)][0] for step in part["step"]],
            s=0.7 * _size(axes),
            edgecolors="white",
            linewidths=0.2,
            zorder=2,
        )


def _all_methods(axes: Axes, narrow: bool) -> None:
    rows: list[tuple[str, Labels, Literal["step", "site"] | None]] = [
        ("pooled", "printed", None),
        (
            "in a checkpoint,\nprinted" if narrow else "within a checkpoint, printed",
            "printed",
            "step",
        ),
        (
            "in a checkpoint,\nreordered" if narrow else "within a checkpoint, reordered",
            "reordered",
            "step",
        ),
        (
            "along a weight,\nreordered" if narrow else "along a weight, reordered",
            "reordered",
            "site",
        ),
    ]
    look.panel_title(axes, "e", "every r, query")
    for height, (_, labels, by) in enumerate(rows):
        for number, method in enumerate(METHODS):
            values = [r(points(method))] if by is None else within(method, labels, by)
            at = height + 0.25 * (number - 1)
            axes.plot(
                [min(values), max(values)],
                [at, at],
                color=METHOD_COLOURS[method],
                linewidth=0.6 * look.weight(axes),
            )
            axes.scatter(
                values,
                [at] * len(values),
                color=METHOD_COLOURS[method],
                marker=METHOD_MARKERS[method],
                s=_size(axes),
                edgecolors="white",
                linewidths=0.3,
                zorder=3,
                label=method if height == 0 else None,
            )
    axes.axvline(0, color=INK, linewidth=0.6 * look.weight(axes), zorder=1)
    axes.set_xlim(-1.06, 1.06)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "+0.5", "+1"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(r"r of $\Delta M$ and $\Delta D$")
    axes.legend(loc="upper center", bbox_to_anchor=(0.72, 1.0), borderaxespad=0.1)
