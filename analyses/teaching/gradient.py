"""DoRA's gradient: Eq. 6 projects it off the weight's direction, Eq. 7 gives that part to m."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from analyses.teaching import look
from analyses.teaching.look import DIRECTION, INK, MAGNITUDE, QUIET, plain, spaced
from analyses.teaching.picture import Picture
from dora_dynamics.adapters import DoRA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from dora_dynamics.plotting import StyledFigure, StyleName

PRETRAINED: Final = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
TURNED: Final = torch.tensor([[1.2, 0.9]], dtype=torch.float64)
"""V′ = W_0 + BA after some training: length 1.5."""
MAGNITUDE_NOW: Final = 1.8
"""m after some training, so that m/‖V′‖_c is not 1."""
GRADIENT: Final = (-0.3, 1.1)


@dataclass(frozen=True)
class Gradients:
    """What autograd gives one DoRA unit of two inputs for a gradient of its weight W′.

    Attributes:
        weight: W′.
        of_weight: ∇_W′ L, as chosen.
        of_direction: ∇_V′ L, with the norm part of the graph (Eq. 6).
        detached: ∇_V′ L with the norm as a constant (Eq. 11).
        of_magnitude: ∇_m L (Eq. 7).
    """

    weight: NDArray[np.float64]
    of_weight: NDArray[np.float64]
    of_direction: NDArray[np.float64]
    detached: NDArray[np.float64]
    of_magnitude: float


def gradients(of_weight: tuple[float, float]) -> Gradients:
    """Backpropagates a gradient of W′ through `dora_dynamics.adapters.DoRA`.

    A is the identity, so that B is V′ − W_0 and its gradient is that of V′.
    """
    found = {}
    for detach in (False, True):
        adapter = DoRA(PRETRAINED, rank=2, alpha=2, detach_norm=detach).double()
        with torch.no_grad():
            adapter.lora_A.copy_(torch.eye(2))
            adapter.lora_B.copy_(TURNED - PRETRAINED)
            adapter.magnitude.fill_(MAGNITUDE_NOW)
        weight = adapter(PRETRAINED)
        (weight * torch.tensor([of_weight], dtype=torch.float64)).sum().backward()
        found[detach] = adapter
    exact, detached = found[False], found[True]
    assert exact.lora_B.grad is not None
    assert exact.magnitude.grad is not None
    assert detached.lora_B.grad is not None
    return Gradients(
        weight=weight.detach()[0].numpy(),
        of_weight=np.asarray(of_weight, dtype=np.float64),
        of_direction=exact.lora_B.grad[0].numpy(),
        detached=detached.lora_B.grad[0].numpy(),
        of_magnitude=float(exact.magnitude.grad),
    )


@cache
def around() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gradients of length 1 at angles of 0° to 180° from V′: ∇_m, ‖∇_V′‖, and ‖∇_V′‖ detached."""
    degrees = np.arange(0.0, 181.0, 15.0)
    start = np.arctan2(float(TURNED[0, 1]), float(TURNED[0, 0]))
    rows = []
    for angle in start + np.radians(degrees):
        found = gradients((float(np.cos(angle)), float(np.sin(angle))))
        lengths = [np.linalg.norm(each) for each in (found.of_direction, found.detached)]
        rows.append([found.of_magnitude, *lengths])
    return degrees, np.array(rows)


def picture() -> Picture:
    """The figure with its words."""
    found = gradients(GRADIENT)
    scale = MAGNITUDE_NOW / float(TURNED.norm())
    length = float(np.linalg.norm(found.of_direction))
    caption = (
        "DoRA's weight is W′ = m · V′/‖V′‖ with V′ = W₀ + BA. Of the gradient that reaches W′, "
        "the part along V′ goes to the magnitude (a, Eq. 7: ∇ₘL = "
        f"{plain(found.of_magnitude)}), and only the part across it, scaled by m/‖V′‖ = "
        f"{scale:.1f}, goes to V′ (Eq. 6: length {length:.2f}, at a right angle to V′). A step of "
        "V′ can therefore turn the weight but, to first order, not lengthen V′; the two are "
        "trained apart. (b) turns a gradient of length 1 around: what m gets is its cosine with "
        f"V′, what V′ gets its sine times {scale:.1f}. Treating the norm as a constant, which "
        "saves memory (Eq. 11), lets the whole gradient through to V′. All values are those of "
        "autograd on `dora_dynamics.adapters.DoRA` (dots), which equal the equations (lines)."
    )
    alt = (
        "Two panels. First: an arrow V′ and on its line the longer W′; at the tip of W′ a gradient "
        f"arrow is split into a part along V′, {plain(found.of_magnitude)}, and a part across; at "
        f"the tip of V′ the gradient ∇V′L stands at a right angle, of length {length:.2f}. Second: "
        "against the angle between gradient and V′ from 0° to 180°, ∇ₘL falls as a cosine from 1 "
        f"to −1, ‖∇V′L‖ is a sine with its highest value {scale:.1f} at 90°, and with the norm "
        f"detached it is {scale:.1f} at every angle."
    )
    return Picture("gradient", "DoRA's gradient (Eq. 6 and 7)", caption, alt, draw)


def draw(style: StyleName) -> StyledFigure:
    """Two panels: one gradient taken apart, and gradients of every direction."""
    figure, _ = look.figure(style, slide=6.0, column=5.9)
    with figure.drawing():
        if style == "slide":
            vectors, angles = figure.subplots(1, 2, width_ratios=[1.1, 1])
        else:
            vectors, angles = figure.subplots(2, 1, height_ratios=[1.25, 1])
        _vectors(vectors)
        _angles(angles)
    return figure


def _vectors(axes: Axes) -> None:
    found = gradients(GRADIENT)
    v, w, g = TURNED[0].numpy(), found.weight, found.of_weight
    along = found.of_magnitude * v / np.linalg.norm(v)
    look.panel_title(axes, "a", "one gradient, taken apart")
    look.plane(axes, (-0.15, 3.1), (-0.72, 2.45))
    look.arrow(axes, (0, 0), w, QUIET, zorder=2)
    look.arrow(axes, (0, 0), v, INK, zorder=3)
    look.arrow(axes, w, w + g, INK)
    look.arrow(axes, w, w + along, MAGNITUDE, zorder=4)
    look.segment(axes, w + along, w + g, QUIET, weight=0.6, linestyle="--")
    look.right_angle(axes, w + along, w, w + g, 0.09)
    look.arrow(axes, v, v + found.of_direction, DIRECTION)
    look.right_angle(axes, v, (0, 0), v + found.of_direction, 0.09)
    look.label(axes, v, spaced("$V′$"), ha="left", shift=(0.05, -0.13))
    look.label(axes, w, spaced("$W′$"), QUIET, ha="left", shift=(0.06, -0.12))
    look.label(axes, w + g, spaced(r"$\nabla_{W′} L$"), shift=(0.04, 0.1))
    text = r"$\nabla_m L$" + f" = {plain(found.of_magnitude)}"
    look.label(axes, w + along, text, MAGNITUDE, ha="left", shift=(0.07, 0.0))
    tip = v + found.of_direction
    length = float(np.linalg.norm(found.of_direction))
    text = spaced(r"$\nabla_{V′} L$") + f", length {length:.2f}"
    look.label(axes, tip, text, DIRECTION, shift=(-0.02, 0.12))
    sixth = spaced(
        r"$\nabla_{V′} L = \dfrac{m}{\Vert V′ \Vert_c}\,(I - "
        r"\dfrac{V′ V′^T}{\Vert V′ \Vert_c^\mathrm{2}})\,\nabla_{W′} L$"
    )
    seventh = spaced(r"$\nabla_m L = \nabla_{W′} L \cdot V′/\Vert V′ \Vert_c$")
    look.label(axes, (-0.1, -0.24), sixth, DIRECTION, ha="left")
    look.label(axes, (1.95, -0.24), "(Eq. 6)", DIRECTION, ha="left")
    look.label(axes, (-0.1, -0.6), seventh, MAGNITUDE, ha="left")
    look.label(axes, (1.95, -0.6), "(Eq. 7)", MAGNITUDE, ha="left")


def _angles(axes: Axes) -> None:
    degrees, found = around()
    scale = MAGNITUDE_NOW / float(TURNED.norm())
    x = np.linspace(0, 180, 181)
    curves = [
        (np.cos(np.radians(x)), MAGNITUDE, "o"),
        (scale * np.sin(np.radians(x)), DIRECTION, "D"),
        (np.full(len(x), scale), QUIET, "s"),
    ]
    size = 0.45 * float(axes.title.get_fontsize())
    look.panel_title(axes, "b", "a gradient of length 1, turned around")
    for (y, colour, marker), values in zip(curves, found.T, strict=True):
        axes.plot(x, y, color=colour)
        axes.plot(degrees, values, color=colour, marker=marker, linestyle="none", markersize=size)
    axes.axhline(0, color=INK, linewidth=0.4 * look.weight(axes), zorder=1)
    axes.set_ylim(-1.15, 1.75)
    axes.set_xticks([0, 45, 90, 135, 180], ["0°", "45°", "90°", "135°", "180°"])
    axes.set_xlabel(spaced(r"angle between $\nabla_{W′} L$ and $V′$"))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    label = spaced(r"$\Vert\nabla_{V′} L\Vert$")
    look.label(axes, (90, 1.45), label + ", norm detached (Eq. 11)", QUIET, bbox=box)
    look.label(axes, (90, 0.92), label + " (Eq. 6)", DIRECTION, bbox=box)
    look.label(axes, (118, -0.72), r"$\nabla_m L$ (Eq. 7)", MAGNITUDE, ha="right", bbox=box)
    norm = float(TURNED.norm())
    text = spaced(rf"$m$ = {MAGNITUDE_NOW}, $\Vert V′ \Vert_c$ = {norm:.1f}")
    axes.text(0.03, 0.03, text, transform=axes.transAxes)
