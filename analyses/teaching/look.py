"""The common look of the teaching figures: one colour per idea, arrows, labels, panels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dora_dynamics.plotting import StyledFigure, style_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.text import Text

    from dora_dynamics.plotting import Style, StyleName

    Point = Sequence[float] | np.ndarray

MAGNITUDE: Final = "#8E3A80"
"""Of m, ΔM and what acts on them."""
DIRECTION: Final = "#8A6D00"
"""Of V, ΔD and what acts on them."""
INK: Final = "#333333"
QUIET: Final = "#767676"

_SETTINGS: Final = {"mathtext.default": "it"}


def figure(style: StyleName, slide: float, column: float) -> tuple[StyledFigure, Style]:
    """An empty figure as wide as the slide or the column, and so many inches high."""
    look = style_named(style)
    height = slide if style == "slide" else column
    size = (look.text_width if style == "slide" else look.column_width, height)
    return StyledFigure(look, settings=_SETTINGS, figsize=size, layout="constrained"), look


def plane(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """A plane for vectors: equal scales, no frame, the origin marked."""
    axes.set_aspect("equal")
    axes.set_anchor("NW")
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.set_axis_off()
    axes.plot(0, 0, marker="o", color=INK, markersize=2.5 * weight(axes), zorder=5)


def weight(axes: Axes) -> float:
    """The width of a line of the figure's style, which goes with its type."""
    return 0.13 * float(axes.title.get_fontsize())


def arrow(axes: Axes, start: Point, end: Point, colour: str, **options: Any) -> None:
    """A vector from start to end."""
    width = weight(axes)
    style = {"arrowstyle": "-|>,head_width=0.28,head_length=0.55", "mutation_scale": 8 * width}
    axes.annotate(
        "",
        xy=tuple(end),
        xytext=tuple(start),
        zorder=options.pop("zorder", 3),
        arrowprops=style
        | {"color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
        | options,
    )


def segment(axes: Axes, start: Point, end: Point, colour: str, **options: Any) -> None:
    """A line between two points; ``weight`` is its width in those of the style's lines."""
    width = options.pop("weight", 1.0) * weight(axes)
    axes.plot(*zip(start, end, strict=True), color=colour, linewidth=width, **options)


def arc(axes: Axes, radius: float, start: float, end: float, colour: str, **options: Any) -> None:
    """An arc around the origin between two angles in radians."""
    angles = np.linspace(start, end, 60)
    width = options.pop("weight", 0.6) * weight(axes)
    axes.plot(
        radius * np.cos(angles), radius * np.sin(angles), color=colour, linewidth=width, **options
    )


def right_angle(axes: Axes, corner: Point, one: Point, other: Point, size: float) -> None:
    """The mark of a right angle at a corner, between the directions to two points."""
    at = np.asarray(corner, dtype=float)
    u, v = ((np.asarray(p) - at) / np.linalg.norm(np.asarray(p) - at) * size for p in (one, other))
    path = np.array([at + u, at + u + v, at + v])
    axes.plot(path[:, 0], path[:, 1], color=QUIET, linewidth=0.5 * weight(axes))


def label(
    axes: Axes,
    at: Point,
    text: str,
    colour: str = INK,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    **options: Any,
) -> Text:
    """Text at a point of the data, or beside it by `shift`."""
    settings: dict[str, Any] = {"ha": "center", "va": "center", "linespacing": 1.35} | options
    return axes.text(at[0] + shift[0], at[1] + shift[1], text, color=colour, **settings)


def words(axes: Axes, text: str) -> None:
    """Text in the upper left corner of a panel, readable over what is drawn there."""
    box: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.text(
        0.03, 0.97, text, transform=axes.transAxes, va="top", linespacing=1.35, bbox=box, zorder=4
    )


def from_zero(axes: Axes, x: float, y: float) -> None:
    """Axes of ΔM and ΔD that begin just below zero and end at x and y."""
    axes.set_xlim(-0.03 * x, x)
    axes.set_ylim(-0.03 * y, y)
    axes.locator_params(nbins=4)
    axes.set_xlabel(r"$\Delta D$")
    axes.set_ylabel(r"$\Delta M$")


def spaced(formula: str) -> str:
    """A formula whose primes stand clear of the slanted V and W."""
    return formula.replace("V′", r"V\hspace{0.16}′").replace("W′", r"W\hspace{0.16}′")


def panel_title(axes: Axes, letter: str, text: str) -> None:
    """A panel's letter and what it shows, at its left."""
    axes.set_title(f"({letter}) {text}", loc="left")


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def plain(value: float, digits: int = 2) -> str:
    """A number with a true minus where it is negative."""
    return f"{value:.{digits}f}".replace("-", "−")
