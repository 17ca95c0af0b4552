"""A teaching figure: a drawing for two widths, with title, caption and alternative text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_dynamics.plotting import save

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dora_dynamics.plotting import StyledFigure, StyleName

STYLES: tuple[StyleName, ...] = ("slide", "column")
FORMATS = ("svg", "pdf", "png")


@dataclass(frozen=True)
class Picture:
    """A figure with its words; the numbers in them are computed as those in the drawing are.

    Attributes:
        name: of its files, ``NAME_slide.svg`` and so on.
        title: a short name.
        caption: what to see, in words that stand alone.
        alt: what is drawn, for who cannot see it.
        draw: draws it in a style, "slide" or "column".
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[StyleName], StyledFigure]

    def save(self, folder: Path, styles: Sequence[StyleName] = STYLES) -> list[Path]:
        """Writes the figure in every style and format; returns the files."""
        files = []
        for style in styles:
            stem = folder / f"{self.name}_{style}"
            files += save(self.draw(style), stem, FORMATS, title=self.title, alt=self.alt)
        return files
