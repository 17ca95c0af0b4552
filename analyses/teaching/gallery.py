"""The teaching section of figures/README.md, written from the words of the figures."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

BEGIN: Final = "<!-- begin: teaching -->"
END: Final = "<!-- end: teaching -->"
COMMAND: Final = "python -m analyses.teaching"


@dataclass(frozen=True)
class Results:
    """What a run of the recipe says about its figures, as analyses/results/teaching.json has it.

    Attributes:
        figures: name to title, caption, alt and the written files.
        about: runs, versions and machine.
    """

    figures: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]

    def write(self, file: Path) -> None:
        """Writes the results as JSON; what was not drawn this time stays as it was."""
        earlier = Results.read(file) if file.exists() else Results({}, {})
        figures = {**earlier.figures, **self.figures}
        content = {**earlier.about, **self.about, "figures": figures}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Results:
        """Reads what `write` wrote."""
        content = json.loads(file.read_text(encoding="utf-8"))
        return cls(content.pop("figures"), content)


def section(results: Results) -> str:
    """The section: a picture with its alternative text, its caption, and its files."""
    parts = [
        "## To teach with",
        "",
        f"Drawn by `{COMMAND}`; `analyses/lesson.ipynb` uses them. Each is there for a slide and "
        "for a column of a paper.",
    ]
    for figure in results.figures.values():
        files = [Path(name) for name in figure["files"]]
        shown = next((each for each in files if each.suffix == ".gif"), None) or next(
            each for each in files if each.name.endswith("_slide.png")
        )
        links = " · ".join(f"[{_kind(each)}](teaching/{each.name})" for each in files)
        parts += [
            "",
            f"### {figure['title']}",
            "",
            f"![{_plain(figure['alt'])}](teaching/{shown.name})",
            "",
            figure["caption"],
            "",
            links,
        ]
    return "\n".join(parts)


def _kind(file: Path) -> str:
    ending = file.suffix[1:].upper()
    medium = file.stem.rpartition("_")[2]
    return f"{medium} {ending}" if medium in ("slide", "column") else ending


def _plain(alt: str) -> str:
    return alt.replace("[", "(").replace("]", ")")


def filled(text: str, results: Results) -> str:
    """The gallery's text with the section written anew, at its end where it had none."""
    block = f"{BEGIN}\n\n{section(results)}\n\n{END}"
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: block, text)
