"""When to record: every so many steps, at listed steps, or whenever a callable says so."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

Schedule = int | Collection[int] | Callable[[int], bool]


def schedule(every: Schedule) -> Callable[[int], bool]:
    """`every` as a function that is given a step and says whether to record it.

    Raises:
        ValueError: `every` is none of the three, or a number below 1.
    """
    if callable(every):
        return every
    if isinstance(every, (int, np.integer)) and not isinstance(every, bool):
        interval = int(every)
        if interval < 1:
            raise ValueError(f"every must be at least 1, not {every}.")
        return lambda step: step % interval == 0
    if isinstance(every, Collection) and all(isinstance(step, (int, np.integer)) for step in every):
        steps = frozenset(int(step) for step in every)
        return lambda step: step in steps
    raise ValueError(f"every must be a number, a list of steps or a callable, not {every!r}.")
