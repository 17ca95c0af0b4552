"""The recipes that draw no picture of the gallery, told by the first words of their modules."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ANALYSES: Final = Path(__file__).parent
BEGIN: Final = "<!-- begin: recipes -->"
END: Final = "<!-- end: recipes -->"
_RUN: Final = re.compile(r"Run: `(?P<command>[^`]+)`.*?\n\n(?P<question>.+?\.)(?:\s|$)", re.DOTALL)
_FILE: Final = re.compile(r"[\w/{},<>]+\.(?:csv|json|txt)\b")


def recipes() -> Iterator[tuple[str, str, str, list[str]]]:
    """Module, question, command and result files of every recipe that says what it writes."""
    for path in sorted(ANALYSES.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        told = _RUN.match(text)
        if told is not None and (files := list(dict.fromkeys(_FILE.findall(text)))):
            yield path.stem, " ".join(told["question"].split()), told["command"], files


def section(rest: str) -> str:
    """A line for each recipe that the rest of the gallery does not name."""
    lines = ["| recipe | what it asks | command | files |", "|---|---|---|---|"]
    for name, question, command, files in recipes():
        if f"analyses.{name}" not in rest:
            listed = ", ".join(f"`{Path(file).name}`" for file in files)
            cells = " | ".join(
                cell.replace("|", r"\|") for cell in (f"`{name}`", question, f"`{command}`", listed)
            )
            lines.append(f"| {cells} |")
    return "\n".join([BEGIN, "", "## Results without a picture", "", *lines, "", END])
