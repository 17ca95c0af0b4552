"""Figures of magnitude and direction changes: one file per kind of figure, each returns a `Figure`.

What is drawn comes from `dora_dynamics.statistics`; nothing is computed here. No function touches
`matplotlib.pyplot`, so drawing needs no display and leaves no figure open.
"""

from dora_dynamics.plotting._figure import StyledFigure as StyledFigure
from dora_dynamics.plotting._files import save as save
from dora_dynamics.plotting._style import METHOD_COLOURS as METHOD_COLOURS
from dora_dynamics.plotting._style import METHOD_MARKERS as METHOD_MARKERS
from dora_dynamics.plotting._style import Style as Style
from dora_dynamics.plotting._style import StyleName as StyleName
from dora_dynamics.plotting._style import style_named as style_named
from dora_dynamics.plotting.coupling_forest import coupling_forest as coupling_forest
from dora_dynamics.plotting.magnitude_direction import magnitude_direction as magnitude_direction
from dora_dynamics.plotting.trajectories import trajectories as trajectories

__all__ = [
    "METHOD_COLOURS",
    "METHOD_MARKERS",
    "Style",
    "StyleName",
    "StyledFigure",
    "coupling_forest",
    "magnitude_direction",
    "save",
    "style_named",
    "trajectories",
]
