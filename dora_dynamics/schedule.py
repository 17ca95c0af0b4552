"""When to record, and what to keep beside the table."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, get_args

import numpy as np

from dora_dynamics.errors import InputError

Keep = Literal["units", "weights"]
Schedule = int | Collection[int] | Callable[[int], bool]


def schedule(every: Schedule) -> Callable[[int], bool]:
    """`every` as a function that is given a step and says whether to record it.

    Raises:
        InputError: `every` is none of the three, or a number below 1.
    """
    if callable(every):
        return every
    if isinstance(every, (int, np.integer)) and not isinstance(every, bool):
        interval = int(every)
        if interval < 1:
            raise InputError(f"every must be at least 1, not {every}.")
        return lambda step: step % interval == 0
    if isinstance(every, Collection) and all(isinstance(step, (int, np.integer)) for step in every):
        steps = frozenset(int(step) for step in every)
        return lambda step: step in steps
    raise InputError(f"every must be a number, a list of steps or a callable, not {every!r}.")


def kept_kinds(keep: Keep | Collection[Keep]) -> frozenset[str]:
    """The kinds of files that `keep` names.

    Raises:
        InputError: it names something else.
    """
    kinds = frozenset([keep] if isinstance(keep, str) else keep)
    unknown = kinds - set(get_args(Keep))
    if unknown:
        raise InputError(f"keep may name 'units' and 'weights', not {sorted(unknown)}.")
    return kinds
