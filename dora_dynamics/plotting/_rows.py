"""The rows of a table that a figure draws, checked, and the order of its groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_FIRST_METHODS: Final = ("FT", "LoRA", "DoRA")
_LARGEST_DRAWN: Final = 1e300
"""Beyond it matplotlib finds no end of an axis."""


def checked(table: pd.DataFrame, text: Iterable[str], numbers: Iterable[str]) -> pd.DataFrame:
    """The rows with these columns, text as text and numbers as float64, indexed by position.

    Raises:
        InputError: The table is empty, lacks a column, or holds text where numbers belong.
    """
    text, numbers = list(dict.fromkeys(text)), list(dict.fromkeys(numbers))
    missing = [name for name in [*text, *numbers] if name not in table.columns]
    if missing:
        raise InputError(f"the table has no column {', '.join(map(repr, missing))}.")
    if table.empty:
        raise InputError("the table has no rows, so there is nothing to draw.")
    rows = table.reset_index(drop=True)
    columns: dict[str, pd.Series] = {}
    for name in text:
        columns[name] = rows[name].astype(object).where(rows[name].notna(), "").map(str)
    for name in numbers:
        try:
            columns[name] = pd.to_numeric(rows[name]).astype("Float64").astype("float64")
        except (TypeError, ValueError):
            raise InputError(f"column {name!r} should hold numbers, but holds text.") from None
    return pd.DataFrame(columns)


def finite(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows whose `columns` are all finite, index kept.

    Raises:
        InputError: none is left, or one holds a number too large for an axis.
    """
    good = np.isfinite(rows[list(columns)].to_numpy(dtype=np.float64)).all(axis=1)
    kept: pd.DataFrame = rows.loc[good].copy()
    if kept.empty:
        names = " and ".join(repr(name) for name in columns)
        raise InputError(f"no row to draw: {names} are nowhere finite after step 0.")
    for name in columns:
        largest = float(kept[name].abs().max())
        if largest > _LARGEST_DRAWN:
            raise InputError(f"column {name!r} holds {largest:.3g}: that is too large to draw.")
    return kept


def in_order(names: Iterable[str]) -> list[str]:
    """Distinct names: FT, LoRA and DoRA first, then the others as they first appear."""
    distinct = list(dict.fromkeys(names))
    known = [name for name in _FIRST_METHODS if name in distinct]
    return known + [name for name in distinct if name not in known]


def order_of(table: pd.DataFrame, column: str, present: Iterable[str]) -> list[str]:
    """The order of a column's values: that of a categorical, else that of `in_order`."""
    found = in_order(present)
    kind = table[column].dtype
    if isinstance(kind, pd.CategoricalDtype):
        given = list(map(str, kind.categories))
        return sorted(found, key=lambda name: given.index(name) if name in given else len(given))
    return found
