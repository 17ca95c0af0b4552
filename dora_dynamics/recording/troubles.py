"""What goes wrong beside a training that must go on: told once, by the thread that trains."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from pathlib import Path
from typing import Final

import torch

_NO_USERS: Final = (
    f"{Path(__file__).parents[1]}/",
    f"{Path(torch.__file__).parent}/",
    contextlib.__file__,
)
"""Files through which a user's line leads to a warning: ours, and torch's, which call our hooks."""


class Troubles:
    """Failures of a recorder, each kind of which is told once until it is over.

    Attributes:
        are_fatal: raise them instead.
    """

    def __init__(self, *, are_fatal: bool) -> None:
        """Nothing went wrong so far."""
        self.are_fatal = are_fatal
        self._known: set[str] = set()
        self._untold: list[str] = []
        self._guard = threading.Lock()

    def note(self, kind: str, message: str, error: Exception) -> None:
        """Take note of a failure, from any thread.

        Raises:
            Exception: `error`, where failures are fatal.
        """
        if self.are_fatal:
            raise error
        with self._guard:
            if kind not in self._known:
                self._known.add(kind)
                self._untold.append(message)

    def knows(self, kind: str) -> bool:
        """Whether such a failure is going on."""
        return kind in self._known

    def is_over(self, kind: str) -> None:
        """It works again: when it fails another time, that is told."""
        with self._guard:
            self._known.discard(kind)

    def tell(self) -> None:
        """Warn of what is not told yet; for the thread that trains."""
        with self._guard:
            untold, self._untold = self._untold, []
        for message in untold:
            warn_user(message)


def warn_user(message: str) -> None:
    """Warn at the line of the user's that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NO_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def in_words(error: Exception) -> str:
    """An error as part of a sentence."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(text.split()).rstrip(".")
