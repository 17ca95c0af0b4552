"""How figures look: sizes and fonts per medium, colours per layer, markers per checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import matplotlib as mpl
from matplotlib.colors import Normalize, to_hex

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

StyleName = Literal["paper", "column", "slide"]

LAYER_COLOURS: Final = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#000000",
)
"""Okabe and Ito's colours, told apart with any colour vision; their yellow is lost on white."""

LAYER_MAP: Final = "viridis"
"""The colour map of models with more layers than `LAYER_COLOURS`."""

NO_LAYER_COLOUR: Final = "#777777"
LAYER_MARKERS: Final = ("o", "s", "D", "^", "v", "P", "X")
"""Markers of lines that stand for layers: as many as `LAYER_COLOURS`."""

METHOD_COLOURS: Final = {"FT": "#0072B2", "LoRA": "#D55E00", "DoRA": "#009E73"}
METHOD_MARKERS: Final = {"FT": "o", "LoRA": "s", "DoRA": "D"}
"""Colours and markers of the paper's three methods, where methods share a panel."""

LINE_COLOUR: Final = "#333333"
INTERMEDIATE_MARKERS: Final = ("^", "s", "D")
FINAL_MARKER: Final = "o"
MARKER_SCALE: Final = {"^": 1.15, "s": 0.8, "D": 0.65, "o": 1.0}
"""Areas that make the four markers look equally large."""


@dataclass(frozen=True)
class Style:
    """Sizes for one medium, in inches and points.

    "paper" fits two-column pages: one column of panels 3.25 in wide, several across the page.
    "column" puts all panels below each other into one column. "slide" is for a screen.

    Attributes:
        column_width: Width of a figure with one column of panels.
        text_width: Width of a figure with several.
        panel_height: Height of one row of panels.
        font_size: Size of labels; ticks and legends are one point smaller.
        marker_area: Area of a point, in square points.
        line_width: Width of drawn lines; axes are thinner.
        most_columns: Panels side by side before a new row begins.
        dpi: Dots per inch where the figure is saved as pixels.
    """

    column_width: float
    text_width: float
    panel_height: float
    font_size: float
    marker_area: float
    line_width: float
    most_columns: int = 4
    dpi: int = 300

    def rc(self) -> dict[Any, Any]:
        """The matplotlib settings of this style."""
        small = self.font_size - 1
        return {
            **FILE_RC,
            "font.family": "sans-serif",
            "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
            "font.size": self.font_size,
            "axes.titlesize": self.font_size,
            "axes.labelsize": self.font_size,
            "xtick.labelsize": small,
            "ytick.labelsize": small,
            "legend.fontsize": small,
            "legend.title_fontsize": small,
            "legend.frameon": False,
            "legend.handletextpad": 0.5,
            "legend.handlelength": 1.6,
            "figure.titlesize": self.font_size + 1,
            "figure.facecolor": "white",
            "figure.constrained_layout.h_pad": 0.4 * self.font_size / 72,
            "figure.constrained_layout.w_pad": 0.5 * self.font_size / 72,
            "axes.facecolor": "white",
            "axes.linewidth": 0.45 * self.line_width,
            "axes.edgecolor": LINE_COLOUR,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.4 * self.line_width,
            "xtick.major.width": 0.45 * self.line_width,
            "ytick.major.width": 0.45 * self.line_width,
            "xtick.major.size": 2.5,
            "ytick.major.size": 2.5,
            "axes.unicode_minus": True,
            "axes.formatter.use_mathtext": True,
            "axes.formatter.limits": (-4, 5),
            "mathtext.default": "regular",
            "lines.linewidth": self.line_width,
            "savefig.facecolor": "white",
            "savefig.dpi": self.dpi,
        }


FILE_RC: Final[dict[Any, Any]] = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "dora-dynamics",
    "savefig.dpi": 200,
}
"""Settings that matter while writing files: fonts embedded or left as text, stable identifiers."""

_STYLES: Final[dict[StyleName, Style]] = {
    "paper": Style(3.25, 6.75, 2.05, 7.5, 15.0, 1.1),
    "column": Style(3.25, 3.25, 1.8, 7.5, 15.0, 1.1, most_columns=1),
    "slide": Style(8.0, 12.8, 4.6, 15.0, 60.0, 2.2, dpi=150),
}


def style_named(name: str) -> Style:
    """The style of this name; `InputError` naming the choices where there is none."""
    for known in get_args(StyleName):
        if name == known:
            return _STYLES[known]
    choices = ", ".join(repr(known) for known in get_args(StyleName))
    raise InputError(f"style {name!r} is unknown; choose one of {choices}.")


def context(style: Style) -> AbstractContextManager[None]:
    """Draws with the settings of `style` and puts the caller's back afterwards."""
    return mpl.rc_context(style.rc())


def layer_colours(layers: Sequence[int]) -> dict[int, str]:
    """A colour for each layer: qualitative while there are few, else from a colour map.

    Args:
        layers: Distinct layer numbers in ascending order.
    """
    if len(layers) <= len(LAYER_COLOURS):
        return dict(zip(layers, LAYER_COLOURS, strict=False))
    scale = Normalize(layers[0], layers[-1])
    return {layer: to_hex(mpl.colormaps[LAYER_MAP](scale(layer))) for layer in layers}


def signed_number(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus, e.g. ``−0.31``; large or tiny ones as ``+1.2e−05``.

    From 100 on it has no decimals.
    """
    plain = value == 0 or 1e-2 <= abs(value) < 1e4
    if plain and abs(value) >= 100:
        digits = 0
    return f"{value:+.{digits}{'f' if plain else 'e'}}".replace("-", "−")


def correlation(value: float) -> str:
    """A correlation with its sign and two digits, however small, e.g. ``+0.00``."""
    return f"{value:+.2f}".replace("-", "−")
