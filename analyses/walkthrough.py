"""Run: `python -m analyses.walkthrough` (half a minute), then `python -m analyses.readme_tables`.

What the README's walk-through prints, in which a new adapter is trained and diagnosed. Runs it as
it stands there and writes analyses/results/walkthrough.txt, from where the README shows it.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dora_dynamics import provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

README: Final = Path(__file__).parent.parent / "README.md"
OUTPUT: Final = Path(__file__).parent / "results" / "walkthrough.txt"
_EXAMPLE: Final = re.compile(
    r"## Diagnose a new method.*?<!-- test [^\n]*\n(.*?)-->\s*```python\n(.*?)```", re.DOTALL
)


def printed() -> str:
    """What the walk-through prints.

    Raises:
        ValueError: the README has none.
    """
    found = _EXAMPLE.search(README.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{README} has no walk-through.")
    output = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
    ):
        exec("\n".join(found.groups()), {"__name__": "__main__"})
    return output.getvalue()


def block() -> str:
    """The walk-through's output as the README shows it."""
    text, about = OUTPUT.read_text(encoding="utf-8").rstrip().rsplit("\n\n", 1)
    return f"```text\n{text}\n```\n\n{about}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs it and writes the output."""
    text = printed()
    about = f"{provenance.machine()}, torch {provenance.versions()['torch']}."
    OUTPUT.write_text(f"{text}\n{about}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
