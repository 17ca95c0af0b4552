"""Pieces of sentences that a diagnosis and its findings share."""

from __future__ import annotations


def p_value(value: float) -> str:
    """A p-value with its sign of relation, as `p` stands before it."""
    return f"= {value:.1g}" if value >= 1e-4 else "< 0.0001"


def count(number: int, word: str) -> str:
    """So many of a thing: "1 run", "3 runs"."""
    return f"{number} {word}{'' if number == 1 else 's'}"
