"""Text from files of unknown origin, made fit to be shown: on a terminal, in a figure.

Names of runs, methods and weights come from strangers. What would command a terminal, break a
figure's file or start a formula in it is shown as the characters it is made of.
"""

from __future__ import annotations

from typing import Final

_LONGEST: Final = 1500
"""Characters of a message: names of a stranger in it may be of any length."""
_WIDEST: Final = 100
"""Characters of a name in a figure."""


def visible(text: str) -> str:
    """`text` with what is not printable, but for line ends, as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def in_one_line(message: str) -> str:
    """A message as one line of bounded length, in which nothing commands a terminal."""
    line = visible(" ".join(message.split()))
    if len(line) <= _LONGEST:
        return line
    half = _LONGEST // 2
    return f"{line[:half]} … {line[-half:]}"


def in_a_cell(text: str) -> str:
    """`text` as a cell of a table: on one line, its line ends as escapes."""
    return visible(text.replace("\n", "\\n"))


def in_figure(name: str) -> str:
    """A name as text of a figure: no formula in it, one line, not wider than the page."""
    line = in_a_cell(name)
    shown = line if len(line) <= _WIDEST else f"{line[:_WIDEST]}…"
    return shown.replace("$", r"\$")
