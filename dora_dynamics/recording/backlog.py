"""Work that waits for a GPU, done in order by a thread of its own while training goes on.

Python runs one thread at a time. What a step's measurement waits for is often what the training
waits for too (the GPU has done all that was queued), and it is the training that should go on first
then: an idle GPU waits for it. So the work comes a moment later, when the GPU has enough to do.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT: Final = 4
"""Pieces of work that may wait; then `add` waits for the oldest, so that memory stays bounded."""
PAUSE: Final = 0.05
"""Seconds that work leaves to others once it could begin, unless it is waited for."""


class Backlog:
    """Pieces of work in the order in which they came.

    What one of them raises is raised by the next call of `add` or `wait`; what came after it is
    still done.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()
        self._hurry = threading.Event()

    def add(self, work: Callable[[], None], after: Callable[[], object] | None = None) -> None:
        """Do `work` after all that was added before.

        Args:
            work: what is done.
            after: what to wait for first; then the work begins after a pause, which ends early
                where more work is added or somebody waits.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "dora-dynamics-rows")
        if all(piece.done() for piece in self._waiting):
            self._hurry.clear()
        else:
            self._hurry.set()
        self._waiting.append(self._thread.submit(self._do, work, after))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > LIMIT):
            self._waiting.popleft().result()

    def _do(self, work: Callable[[], None], after: Callable[[], object] | None) -> None:
        if after is not None:
            after()
            self._hurry.wait(PAUSE)
        work()

    def wait(self) -> None:
        """Return when everything is done."""
        self._hurry.set()
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
