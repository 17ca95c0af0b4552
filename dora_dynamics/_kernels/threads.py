"""Threads of our own, so that measuring leaves torch's thread settings as they are.

Work is cut into tasks that run single-threaded; torch's OpenMP threads, which may spin for
milliseconds after each small operation, are not woken.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_limit: ContextVar[int | None] = ContextVar("limit", default=None)
_pools: dict[int, ThreadPoolExecutor] = {}
"""By process: a forked child does not inherit its parent's threads."""


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Within it, and in copies of its context, work is spread over so many threads."""
    token = _limit.set(count)
    try:
        yield
    finally:
        _limit.reset(token)


def workers() -> int:
    """Threads that work is spread over."""
    return _limit.get() or torch.get_num_threads()


def run_all(tasks: Sequence[Callable[[], None]], worth_threads: bool) -> None:
    """Run every task, in parallel if worth it.

    As many threads take part as torch is set to use, or as `at_most` says.
    """
    count = min(workers(), len(tasks)) if worth_threads else 1
    if count < 2:
        for task in tasks:
            task()
        return
    waiting = iter(tasks)  # next() on a list iterator is atomic

    def work() -> None:
        for task in waiting:
            task()

    helpers = [_pool().submit(work) for _ in range(count - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            helper.result()


def _pool() -> ThreadPoolExecutor:
    process = os.getpid()
    if process not in _pools:
        _pools.clear()
        _pools[process] = ThreadPoolExecutor(os.cpu_count(), "dora-dynamics")
    return _pools[process]
