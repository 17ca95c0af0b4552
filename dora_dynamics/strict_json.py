"""JSON from files of unknown origin: it has one meaning, or it is refused.

Python's reader takes the last of two equal keys, NaN, numbers beyond float64, half characters and
any depth. Other readers take other things for the same text; each of these is a way to show a
person one number and compute with another.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final, NoReturn

_DEEPEST: Final = 64
"""Levels of objects and lists in each other."""


class DuplicateKeyError(ValueError):
    """A JSON object holds one key twice; the message is the key."""


def parsed(content: bytes | str, *, finite: bool = True) -> Any:
    """The value that JSON text stands for.

    Args:
        content: text, or UTF-8 without a byte order mark.
        finite: refuse NaN and Infinity, and numbers that float64 holds as such.

    Raises:
        DuplicateKeyError: an object holds one key twice.
        ValueError: it is no JSON, or not of one meaning; the message says why.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_number if finite else None,
            parse_float=_finite if finite else None,
        )
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for half characters
    return value


_TOO_DEEP: Final = f"it is nested more than {_DEEPEST} levels deep"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(repr(key[:100]))
            seen.add(key)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _no_number(text[:40])
    return value


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
