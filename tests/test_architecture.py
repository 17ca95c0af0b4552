"""The order of the rooms in ARCHITECTURE.md is that of the imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dora_dynamics"


def rooms() -> list[str]:
    """The names in the first column of the page's tables, from the top down."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    columns = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return [name for column in columns for name in re.findall(r"`(\w+)/?`", column)]


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of this package that are imported when the code runs, also inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module == "dora_dynamics":
            yield from (f"dora_dynamics.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
        yield from imports(node)


def test_every_room_is_there() -> None:
    named = rooms()
    assert len(named) == len(set(named)) > 20
    there = {path.stem for path in PACKAGE.iterdir()}
    assert not set(named) - there


def test_a_room_imports_only_rooms_below_it() -> None:
    order = {name: place for place, name in enumerate(rooms())}
    upwards = set()
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports(ast.parse(file.read_text(encoding="utf-8"))):
            parts = module.split(".")
            if parts[0] != "dora_dynamics" or len(parts) < 2:
                continue
            other = parts[1]
            if room in order and order.get(other, len(order)) < order[room]:
                upwards.add(f"{room} -> {other}")
    assert not upwards
