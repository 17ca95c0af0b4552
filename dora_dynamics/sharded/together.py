"""What processes agree on from record to record, so that none waits for one that failed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from dora_dynamics.sharded.adapted import form_of
from dora_dynamics.sharded.changes import exchanged
from dora_dynamics.sharded.collectives import told
from dora_dynamics.sharded.holding import FailedElsewhereError, ShardingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dora_dynamics.decomposition import Axis, UnitChange
    from dora_dynamics.sharded.adapted import Form, Weight


class Together:
    """Measures sharded weights at every record, whatever fails on some of the processes.

    How much is exchanged depends on the adapters: each process must know it of the others before.
    They tell each other once. A process that finds other adapters than those, at a later record,
    says so beside its sums, and all of them tell each other anew. So a record takes no message more
    than its sums, unless adapters were changed.
    """

    def __init__(self) -> None:
        """Nothing is agreed on yet."""
        self._own: list[Form | None] = []
        self._agreed: list[Form | None] | None = None

    def changes(
        self, weights: Sequence[Weight], axis: Axis, *, failed: bool = False
    ) -> tuple[list[list[UnitChange] | Exception], FailedElsewhereError | None]:
        """The changes of weights, or why there are none; all processes call this.

        Args:
            weights: the same on all processes.
            axis: which axis the units are.
            failed: whether this process failed at something else, which others are to know.

        Returns:
            Of each weight the changes at its sites; an exception where a process could not read it
            or sum it, the same weights everywhere. And whether anything failed on any process.
        """
        weights, own = _with_forms(weights, axis)
        while True:
            if self._agreed is None:
                self._agreed, self._own = _agreed(told(own)), own
            others = [
                i
                for i, (form, agreed) in enumerate(zip(own, self._agreed, strict=True))
                if form is not None and form != agreed
            ]
            is_new = any(own[i] != self._own[i] for i in others)
            differs = ShardingError("its adapter is not the same on all processes")
            unfit = dict.fromkeys(others, differs)
            say = [is_new, failed, failed * dist.get_rank()]
            found = exchanged(weights, self._agreed, axis, unfit, say)
            if found.said[0] == 0:
                break
            self._agreed = None
        processes, ranks = int(found.said[1]), int(found.said[2])
        failure = FailedElsewhereError(processes, ranks) if processes else None
        return found.changes, failure


def _with_forms(weights: Sequence[Weight], axis: Axis) -> tuple[list[Weight], list[Form | None]]:
    """The weights with their forms; one that has none could not be read."""
    found: list[Weight] = []
    forms: list[Form | None] = []
    for weight in weights:
        try:
            form = form_of(weight, axis)
        except Exception as error:
            weight, form = replace(weight, after=error), None
        found.append(weight)
        forms.append(form)
    return found, forms


def _agreed(said: Sequence[Sequence[Form | None]]) -> list[Form | None]:
    """The form of each weight that all processes give it which can; None where there is none."""
    agreed: list[Form | None] = []
    for forms in zip(*said, strict=True):
        distinct = set(forms) - {None}
        agreed.append(distinct.pop() if len(distinct) == 1 else None)
    return agreed
