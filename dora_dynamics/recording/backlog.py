"""Work that waits for a GPU, done in order by a thread of its own while training goes on."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT: Final = 4
"""Pieces of work that may wait; then `add` waits for the oldest, so that memory stays bounded."""


class Backlog:
    """Pieces of work in the order in which they came.

    What one of them raises is raised by the next call of `add` or `wait`; what came after it is
    still done.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def add(self, work: Callable[[], None]) -> None:
        """Do `work` after all that was added before."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "dora-dynamics-rows")
        self._waiting.append(self._thread.submit(work))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > LIMIT):
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Return when everything is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Wait, and end the thread until there is work again."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
