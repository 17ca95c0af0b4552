"""Pairs of texts to fine-tune on: find the second, given the first, and tell its label."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Pair:
    """A query, the text that answers it, and where the text is from ("" where it is not told)."""

    query: str
    text: str
    label: str = ""


def read(source: str) -> list[Pair]:
    """Pairs from a JSONL file, or of the train split of a data set known to `datasets`.

    A record holds `query` and `text`, and may hold `label`. Failing these names, its first two
    columns of text are taken, in their order.

    Raises:
        ValueError: a record does not hold two texts.
    """
    if Path(source).is_file():
        with Path(source).open(encoding="utf-8") as lines:
            return [_pair(_parsed(line, source), source) for line in lines if line.strip()]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{source} is no file, and to load a data set of that name needs: pip install datasets."
        ) from error
    return [_pair(record, source) for record in load_dataset(source, split="train")]


def write(pairs: Iterable[Pair], path: Path) -> None:
    """Write pairs as JSONL, one `{"query": …, "text": …, "label": …}` a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(vars(pair), ensure_ascii=False) + "\n")


def digest(pairs: Sequence[Pair]) -> str:
    """Twelve hex digits that tell one list of pairs from another."""
    content = json.dumps([vars(pair) for pair in pairs], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _parsed(line: str, source: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{source} is not JSONL: {error}.") from error
    if not isinstance(record, Mapping):
        raise ValueError(f"{source} holds a line that is no JSON object: {line[:40]!r}.")
    return record


def _pair(record: Mapping[str, Any], source: str) -> Pair:
    texts = [str(value) for value in record.values() if isinstance(value, str)]
    if {"query", "text"} <= record.keys():
        texts = [str(record["query"]), str(record["text"])]
    if len(texts) < 2:
        raise ValueError(
            f"{source} must hold two texts in each record, named query and text; "
            f"one holds {', '.join(record) or 'nothing'}."
        )
    return Pair(texts[0], texts[1], str(record.get("label", "")))
