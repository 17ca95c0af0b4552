"""One comparison spread over the processes that `torchrun` started, on one machine or several."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

_PATIENCE: Final = timedelta(days=1)
"""How long a process waits for the others: a large weight from a slow disk takes its time."""
_PAUSE: Final = 0.1
"""Seconds in which gloo's threads let go of the last tensors, for which they need the interpreter:
torch 2.6 holds it while it waits for them to end, and would wait for ever."""


class LostProcessError(CheckpointError):
    """One of the processes was killed or has lost its connection; each of the others says so."""


@dataclass(frozen=True)
class Processes:
    """The processes that work together; every method is called by all of them, or by none.

    Attributes:
        rank: number of this one; the first writes and speaks.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of some pieces of work are this process's: the largest go to whoever has least."""
        loads = [0] * self.count
        mine = []
        for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            least = loads.index(min(loads))
            loads[least] += sizes[piece] + 1
            if least == self.rank:
                mine.append(piece)
        return sorted(mine)

    def all_results(self, action: Callable[[], T]) -> list[T]:
        """What an action gives on each process, by rank.

        Raises:
            InputError: the first error of any process, on all of them.
            LostProcessError: one of them is gone.
        """
        if self.count == 1:
            return [action()]
        import torch.distributed as dist

        result: Any = None
        said: tuple[type[InputError], str] | None = None
        try:
            result = action()
        except InputError as error:
            said = (type(error), str(error))
        except Exception as error:
            said = (CheckpointError, f"process {self.rank}: {type(error).__name__}: {error}")
        outcomes: list[Any] = [None] * self.count
        lost: str | None = None
        try:
            dist.all_gather_object(outcomes, (result, said))
        except RuntimeError as broken:
            lost = str(broken).partition("\n")[0]
        if lost is not None:  # not from `broken`, whose frames hold the group and its threads
            raise LostProcessError(
                f"another process of this comparison has ended ({lost}); what was written is "
                "complete, and with --out the same command with --resume goes on."
            )
        for _, failure in outcomes:
            if failure is not None:
                kind, message = failure
                raise kind(message)
        return [outcome for outcome, _ in outcomes]

    def each(self, action: Callable[[], T]) -> T:
        """What an action gives here, if it fails on none: results stay where they are."""
        own: list[T] = []
        self.all_results(lambda: own.append(action()))
        return own[0]

    def first(self, action: Callable[[], T]) -> T:
        """What an action gives on the first process, which alone does it."""
        return self.all_results(lambda: action() if self.is_first else None)[0]  # type: ignore[return-value]


@contextmanager
def started_processes() -> Iterator[Processes]:
    """The processes of `torchrun`, by what it says in the environment; else this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), count)
        dist.barrier()  # none takes its connections away while another still uses them
    finally:
        time.sleep(_PAUSE)
        dist.destroy_process_group()
