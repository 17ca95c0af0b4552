"""Real text that every machine has: the docstrings of the installed Python packages.

The task built on it: find the docstring that belongs to a function's name, and tell which package
it is from. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STANDARD_LIBRARY: Final = "python"
PACKAGES: Final = (STANDARD_LIBRARY, "torch", "numpy", "scipy", "pandas", "matplotlib")


@dataclass(frozen=True)
class Example:
    """One documented function: its name in words, its docstring's first paragraph, its package."""

    name: str
    text: str
    package: str


def collect(
    per_package: int, *, packages: Sequence[str] = PACKAGES, seed: int = 0
) -> list[Example]:
    """Documented functions of each package, in an order shuffled by `seed`.

    Files are visited in a seeded order until a package has given `per_package` examples; a name
    or a text that occurs twice is taken once.

    Raises:
        ValueError: a package is not installed, or has too few documented functions.
    """
    generator = random.Random(seed)
    seen: set[str] = set()
    examples: list[Example] = []
    for package in packages:
        files = _sources(package)
        generator.shuffle(files)
        found: list[Example] = []
        for file in files:
            for name, text in _documented_functions(file):
                if len(found) < per_package and not {name, text} & seen:
                    seen |= {name, text}
                    found.append(Example(name, text, package))
            if len(found) == per_package:
                break
        else:
            raise ValueError(
                f"{package} has {len(found)} documented functions, fewer than {per_package}."
            )
        examples += found
    generator.shuffle(examples)
    return examples


def _sources(package: str) -> list[Path]:
    if package == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"the package {package} is not installed.")
        root = Path(spec.submodule_search_locations[0])
    return sorted(
        file
        for file in root.rglob("*.py")
        if not {"tests", "test", "site-packages"} & set(file.relative_to(root).parts)
    )


def _documented_functions(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            text = re.sub(r"\s+", " ", paragraph).strip()
            name = node.name.replace("_", " ").strip()
            if len(text.split()) >= 6 and len(name) >= 4:
                yield name, text
