"""What the result files of the study say: tables, numbers and words of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

if TYPE_CHECKING:
    from dora_dynamics.statistics import Level

RESULTS: Final = Path(__file__).parent / "results"
METHODS: Final = ("FT", "LoRA", "DoRA")
LEVELS: Final[dict[Level, str]] = {
    "pooled": "pooled, as in the paper",
    "within_step": "across layers",
    "within_layer": "over a weight's steps",
    "units": "across units",
}

RUNS: Final = {
    "reproduction_minilm": "MiniLM",
    "reproduction_minilm_no_decay": "MiniLM, no decay",
    "reproduction_bart": "our BART",
    "reproduction_bart_no_decay": "our BART, no decay",
}
"""What `reproduce` was run on, in words, by the name of its results."""

TRIALS: Final = {"FT": 0.83, "DoRA": 0.95}
"""r of the small trials that suggested the role of weight decay: one seed, another 6-layer encoder,
value matrices across layers at the last checkpoint, without decay."""


def table(name: str) -> Any:
    """A table of results."""
    return pd.read_csv(RESULTS / f"{name}.csv")


def about(name: str) -> dict[str, Any]:
    """What is known of how results came about."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def there(*names: str) -> tuple[str, ...]:
    """Those of the names of which there are results."""
    return tuple(name for name in names if (RESULTS / f"{name}.json").exists())


def number(value: float, digits: int = 2) -> str:
    """A number with its sign and a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def with_interval(row: Any, name: str = "pearson", low: str = "", high: str = "") -> str:
    """An estimate and its interval."""
    ends = row[low or f"{name}_low"], row[high or f"{name}_high"]
    return f"{number(row[name])} [{number(ends[0])}, {number(ends[1])}]"


def one(found: Any, **place: Any) -> Any:
    """The only row at a place."""
    for column, value in place.items():
        found = found[found[column] == value]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows at {place}.")
    return found.iloc[0]
