"""Writing figures: the same figure gives the same bytes, with its alternative text inside."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from xml.sax.saxutils import escape

import matplotlib as mpl

from dora_dynamics.errors import InputError
from dora_dynamics.plotting._figure import settings_of
from dora_dynamics.shown_text import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.figure import Figure

_UNDATED: Final[dict[str, dict[str, None]]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}
_FORMULA_FONT: Final = "; font-family: 'DejaVu Sans'"
_TITLES: Final = {"pdf": ("Title", "Subject"), "png": ("Title", "Description")}


def save(
    figure: Figure,
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    formats: Sequence[str] = ("png", "svg"),
    *,
    title: str | None = None,
    alt: str | None = None,
) -> list[Path]:
    """Writes a figure into one file per format, without dates or versions in the files.

    PDF fonts are embedded as TrueType and SVG text stays text, so both can be edited. Title and
    alternative text go into the files: `<title>` and `<desc>` of an SVG with the role of an image,
    the properties of a PDF, the text chunks of a PNG.

    Args:
        figure: What to write.
        path: The files' common path without its ending, to which each format is added; or several
            paths with their endings, and then `formats` is not used. Missing folders are made.
        formats: Endings among png, svg and pdf.
        title: A short name; that drawn above the figure where None.
        alt: What the figure shows, in words; where None the figure's own `alt`, which every figure
            of this package has.

    Returns:
        The written files, in order.

    Raises:
        InputError: A format is none of png, svg and pdf.
    """
    if isinstance(path, str | os.PathLike):
        stem = Path(path)
        paths = [stem.with_name(f"{stem.name}.{ending}") for ending in formats]
    else:
        paths = [Path(each) for each in path]
    unknown = sorted({each.suffix for each in paths if each.suffix[1:].lower() not in _UNDATED})
    if unknown:
        raise InputError(f"figures are written as png, svg or pdf, not {', '.join(unknown)!r}.")
    words = (
        visible(figure.get_suptitle() if title is None else title),
        visible(getattr(figure, "alt", "") if alt is None else alt),
    )
    with mpl.rc_context(settings_of(figure)):
        for each in paths:
            each.parent.mkdir(parents=True, exist_ok=True)
            ending = each.suffix[1:].lower()
            metadata: dict[str, Any] = dict(_UNDATED[ending])
            metadata |= {
                name: text
                for name, text in zip(_TITLES.get(ending, ()), words, strict=False)
                if text
            }
            figure.savefig(each, format=ending, metadata=metadata)
            if ending == "svg":
                _finish(each, *words)
    return paths


def _finish(svg: Path, title: str, alt: str) -> None:
    """Gives formulas a font to fall back to; makes the SVG one image that screen readers name."""
    text = svg.read_text(encoding="utf-8").replace(_FORMULA_FONT, f"{_FORMULA_FONT}, sans-serif")
    words = {name: text for name, text in (("title", title), ("desc", alt)) if text}
    if words:
        # Several figures may be put into one page, where an identifier must be unique.
        mark = hashlib.sha256("\n".join(words.values()).encode()).hexdigest()[:12]
        elements = "".join(
            f'\n <{name} id="{name}-{mark}">{escape(content)}</{name}>'
            for name, content in words.items()
        )
        labels = " ".join(f"{name}-{mark}" for name in words)
        start = text.index("<svg ")
        end = text.index(">", start)
        text = f'{text[:end]} role="img" aria-labelledby="{labels}">{elements}{text[end + 1 :]}'
    svg.write_text(text, encoding="utf-8")
