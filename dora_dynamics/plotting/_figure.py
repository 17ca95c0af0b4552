"""A figure that keeps its style, whoever draws or saves it, and says in words what it shows."""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from dora_dynamics.plotting._style import FILE_RC

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from matplotlib.backend_bases import RendererBase

    from dora_dynamics.plotting._style import Style

_SCREEN_DPI = 144


class StyledFigure(Figure):
    """A matplotlib figure drawn and saved with the settings of its style.

    Made as `StyledFigure(style_named("paper"), figsize=..., layout="constrained")`; further
    matplotlib settings, by `settings=`, stand above those of the style. Add artists inside
    `figure.drawing()`, where these settings hold.

    Fonts are looked up and files are written with these settings, so that `figure.savefig` embeds
    fonts as the package's own `save` does, whatever the caller's settings are. It is not registered
    with pyplot; a notebook shows it all the same.

    Attributes:
        alt: What the figure shows, in words: the alternative text that `save` writes into files.
    """

    def __init__(
        self, style: Style, *args: Any, settings: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self._settings: dict[Any, Any] = style.rc() | dict(settings or {})
        self.alt: str = ""
        with mpl.rc_context(self._settings):
            super().__init__(*args, **options)

    def drawing(self) -> AbstractContextManager[None]:
        """The settings of this figure, to add artists with."""
        return mpl.rc_context(self._settings)

    def draw(self, renderer: RendererBase) -> None:
        """Draws with the settings of the style."""
        with mpl.rc_context(self._settings):
            super().draw(renderer)

    def savefig(
        self,
        fname: str | os.PathLike[Any] | IO[Any],
        *,
        transparent: bool | None = None,
        **options: Any,
    ) -> None:
        """`Figure.savefig` with the settings of the style."""
        with mpl.rc_context(self._settings):
            super().savefig(fname, transparent=transparent, **options)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=_SCREEN_DPI)
        return file.getvalue()


def settings_of(figure: Figure) -> dict[Any, Any]:
    """What to write files of this figure with."""
    return figure._settings if isinstance(figure, StyledFigure) else FILE_RC
