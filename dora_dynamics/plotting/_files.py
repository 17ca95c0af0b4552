"""Writing figures so that the same figure gives the same bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl

from dora_dynamics.plotting._style import FILE_RC

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.figure import Figure

_UNDATED: Final[dict[str, dict[str, None]]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


def save(
    figure: Figure,
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    formats: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """Writes a figure into one file per format, without dates or versions in the files.

    PDF fonts are embedded as TrueType and SVG text stays text, so both can be edited.

    Args:
        figure: What to write.
        path: The files' common path without its ending, to which each format is added; or several
            paths with their endings, and then `formats` is not used. Missing folders are made.
        formats: Endings among png, svg and pdf.

    Returns:
        The written files, in order.

    Raises:
        ValueError: A format is none of png, svg and pdf.
    """
    if isinstance(path, str | os.PathLike):
        stem = Path(path)
        paths = [stem.with_name(f"{stem.name}.{ending}") for ending in formats]
    else:
        paths = [Path(each) for each in path]
    unknown = sorted({each.suffix for each in paths if each.suffix[1:].lower() not in _UNDATED})
    if unknown:
        raise ValueError(f"figures are written as png, svg or pdf, not {', '.join(unknown)!r}.")
    with mpl.rc_context(FILE_RC):
        for each in paths:
            each.parent.mkdir(parents=True, exist_ok=True)
            ending = each.suffix[1:].lower()
            figure.savefig(each, format=ending, metadata=_UNDATED[ending])
    return paths
