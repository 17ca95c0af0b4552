"""Run: `python -m analyses.architecture_table` (seconds; needs transformers).

What of every architecture that tests/sites builds would be followed, and as what. Writes
architectures.csv; `table()` is the same in Markdown, for README.md.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dora_dynamics.sites.catalogue import Weight

RESULTS: Final = Path(__file__).parent / "results"
NAME: Final = "architectures.csv"
_PARTS: Final = ("query", "key", "value")


def rows() -> pd.DataFrame:
    """One row for each architecture."""
    from dora_dynamics.sites import list_weights

    architectures = importlib.import_module("tests.sites.architectures").ARCHITECTURES
    found = []
    for name, architecture in architectures.items():
        model = architecture.make()
        weights = [weight for weight in list_weights(model) if weight.kind == "matrix"]
        found.append(
            {
                "architecture": name,
                "class": type(model).__name__,
                "stacks": _listed(weight.wholes[0].stack for weight in weights),
                "query, key, value": _attention(weights),
                "heads": _heads(weights),
                "experts": max(len(weight.wholes) for weight in weights) > 1,
                "stored": _listed(_order(weight) for weight in weights),
                "roles": _listed(role for weight in weights for role in _roles(weight)),
            }
        )
    return pd.DataFrame(found)


def table(architectures: pd.DataFrame | None = None) -> str:
    """The rows as a Markdown table; architectures that differ in nothing share a line."""
    if architectures is None:
        architectures = pd.read_csv(RESULTS / NAME, keep_default_na=False)
    lines = [
        "| architecture | stacks | query, key, value | rows per head | stored as | other roles |",
        "|---|---|---|---|---|---|",
    ]
    columns = ["stacks", "query, key, value", "heads", "stored", "roles"]
    for key, group in architectures.groupby(columns, sort=False):
        cells = [str(cell) or "–" for cell in key]
        lines.append(f"| {', '.join(group['architecture'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _attention(weights: Sequence[Weight]) -> str:
    """The modules that hold query, key and value, and whether they are split."""
    fused = [weight for weight in weights if {part.role for part in weight.parts} >= {*_PARTS}]
    if fused:
        return f"split from `{_leaf(fused[0])}`"
    separate = {w.role: f"`{_leaf(w)}`" for w in weights if w.role in _PARTS}
    return ", ".join(separate[part] for part in _PARTS if part in separate)


def _heads(weights: Iterable[Weight]) -> str:
    """How many heads query and key have, in words."""
    counts: dict[str, int] = {}
    for weight in weights:
        for site in (*weight.wholes, *weight.parts):
            heads = len({head.head for head in weight.heads(site) if head.role == site.role})
            counts[site.role] = max(counts.get(site.role, 0), heads)
    query, key = counts.get("query", 0), counts.get("key", 0)
    if not query:
        return ""
    return "yes" if key == query else "yes, multi-query" if key == 1 else "yes, grouped"


def _roles(weight: Weight) -> list[str]:
    """The roles of a weight or of its parts, but for query, key and value."""
    roles = [part.role for part in weight.parts] or [weight.role]
    return [f"`{role}`" for role in roles if role.removeprefix("cross_") not in _PARTS]


def _order(weight: Weight) -> str:
    return "(in, out)" if weight.wholes[0].stored_transposed else "(out, in)"


def _leaf(weight: Weight) -> str:
    return weight.wholes[0].name.rpartition(".")[2]


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    architectures: Any = rows()
    architectures.to_csv(options.out / NAME, index=False, lineterminator="\n")
    print(table(architectures))


if __name__ == "__main__":
    main()
