"""Run: `python -m analyses.finetuning.docstrings --out FILE` writes what `--data FILE` reads.

Real text that every machine has: the docstrings of the installed Python packages. The task built
on it: find the docstring that belongs to a function's name, and tell which package it is from.
Sources are parsed, never imported.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import random
import re
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from analyses.finetuning import pairs
from analyses.finetuning.pairs import Pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STANDARD_LIBRARY: Final = "python"
PACKAGES: Final = (STANDARD_LIBRARY, "torch", "numpy", "scipy", "pandas", "matplotlib")


def collect(
    per_package: int,
    *,
    packages: Sequence[str] = PACKAGES,
    seed: int = 0,
    at_most: bool = False,
) -> list[Pair]:
    """Documented functions of each package, in an order shuffled by `seed`.

    Files are visited in a seeded order until a package has given `per_package` pairs: a function's
    name in words, its docstring's first paragraph, its package. A name or a text that occurs twice
    is taken once.

    Raises:
        ValueError: a package is not installed, or has too few documented functions and that many
            are not only asked for `at_most`.
    """
    generator = random.Random(seed)
    seen: set[str] = set()
    examples: list[Pair] = []
    for package in packages:
        files = _sources(package)
        generator.shuffle(files)
        found: list[Pair] = []
        for file in files:
            for name, text in _documented_functions(file):
                if len(found) < per_package and not {name, text} & seen:
                    seen |= {name, text}
                    found.append(Pair(name, text, package))
            if len(found) == per_package:
                break
        if len(found) < per_package and not at_most:
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


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the pairs as JSONL and says how many there are of each package."""
    parser = argparse.ArgumentParser(prog="python -m analyses.finetuning.docstrings")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES))
    parser.add_argument("--per-package", type=int, default=300, help="at most so many of each")
    options = parser.parse_args(argv)
    found = collect(options.per_package, packages=options.packages, at_most=True)
    pairs.write(found, options.out)
    for package in options.packages:
        print(f"{package}: {sum(pair.label == package for pair in found)}")
    print(f"Wrote {len(found)} pairs, digest {pairs.digest(found)}, to {options.out}")


if __name__ == "__main__":
    main()
