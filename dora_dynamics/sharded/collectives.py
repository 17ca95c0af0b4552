"""What processes tell each other: sums, rank-sized tensors, whether all agree.

Every function here is called by all processes, in the same order, or by none.
"""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from dora_dynamics.sharded.holding import FailedElsewhereError, ShardingError, held

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

_ALIGNMENT = 8


def device_of(tensor: DTensor) -> torch.device:
    """Where tensors must be for the processes of this one's mesh to exchange them."""
    kind = tensor.device_mesh.device_type
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


@dataclass(frozen=True)
class Sums:
    """What all processes have added up.

    Attributes:
        totals: of each vector; None where a process failed to add its part.
        failures: why, for these vectors.
        said: what was said beside, added up.
    """

    totals: list[NDArray[np.float64] | None]
    failures: dict[int, FailedElsewhereError]
    said: NDArray[np.float64]


def added(
    vectors: Sequence[NDArray[np.float64]],
    held_elements: Sequence[int],
    elements: Sequence[int],
    failed: Collection[int],
    device: torch.device,
    say: Sequence[float] = (),
) -> Sums:
    """Vectors added up over all processes, in one all-reduce.

    Several processes may hold the same block (a replicated dimension of the mesh, a mesh that is a
    part of a larger one): the elements that are held, added up, tell how many copies there are.

    Args:
        vectors: what the blocks of this process add to each vector.
        held_elements: how many elements of the weight behind each vector this process holds.
        elements: how many elements that weight has.
        failed: the vectors that this process has no part of because it failed; they are as long
            as those of the others.
        device: where the processes exchange tensors.
        say: numbers that are added up as they are.

    Raises:
        ShardingError: a weight is not held as a whole, by all processes together.
    """
    count = len(vectors)
    ended = np.zeros((2, count))
    for i in failed:
        ended[:, i] = 1.0, dist.get_rank()
    flat = np.concatenate([*vectors, np.asarray(held_elements, np.float64), *ended, say])
    buffer = torch.from_numpy(flat).to(device)
    dist.all_reduce(buffer)
    total = buffer.cpu().numpy()
    start = sum(map(len, vectors))
    counts, processes, ranks = total[start : start + 3 * count].reshape(3, count)
    totals: list[NDArray[np.float64] | None] = []
    failures = {}
    start = 0
    for i, (vector, whole) in enumerate(zip(vectors, elements, strict=True)):
        here = slice(start, start + len(vector))
        start = here.stop
        if processes[i]:
            failures[i] = FailedElsewhereError(int(processes[i]), int(ranks[i]))
            totals.append(None)
            continue
        copies, rest = divmod(int(counts[i]), whole)
        if rest or copies < 1:
            raise ShardingError(
                f"the processes hold {int(counts[i])} elements of a weight of {whole}: all "
                "processes must follow the same weights (one recorder on each), and hold them as "
                "a whole."
            )
        totals.append(total[here] / copies)
    return Sums(totals, failures, total[len(total) - len(say) :])


@dataclass(frozen=True)
class Wanted:
    """A tensor of rank size that all processes are to have as a whole.

    Attributes:
        shape: of the whole.
        dtype: its type.
        part: what this process has of it; None where it failed to read that.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: DTensor | None


def joined(
    tensors: Sequence[Wanted], device: torch.device
) -> tuple[list[Tensor], dict[int, Exception]]:
    """The whole of each tensor, bit by bit, in one all-reduce: meant for what is of rank size.

    Bytes that this process does not hold are zero here, and the largest of all is taken; so any
    sharding, uneven, empty or replicated, is the same case.

    Returns:
        Them, and by position where this process failed to give its part: there they mean nothing,
        and it must say so when sums are added.
    """
    if not tensors:
        return [], {}
    nbytes = [math.prod(wanted.shape) * wanted.dtype.itemsize for wanted in tensors]
    sizes = [-(-size // _ALIGNMENT) for size in nbytes]
    buffer = torch.zeros(_ALIGNMENT * sum(sizes), dtype=torch.uint8, device=device)
    found: list[Tensor] = []
    failed: dict[int, Exception] = {}
    start = 0
    for wanted, used, size in zip(tensors, nbytes, sizes, strict=True):
        whole = buffer[start : start + used].view(wanted.dtype).view(wanted.shape)
        start += _ALIGNMENT * size
        if wanted.part is not None:
            try:
                local, offsets = held(wanted.part)
                spans = zip(offsets, local.shape, strict=True)
                whole[tuple(slice(first, first + count) for first, count in spans)].copy_(local)
            except Exception as error:
                failed[len(found)] = error
        found.append(whole)
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
    return found, failed


def told(value: T) -> list[T]:
    """What each process says, in the order of their ranks; small Python values only."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_main_process() -> bool:
    """Whether this process writes the files."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def by_main_process(action: Callable[[], object], *, together: bool) -> None:
    """Let the main process do something.

    Args:
        action: what to do.
        together: whether all processes are here; then what the action raises, all of them raise,
            so that none waits for one that has ended.
    """
    with all_alike(together):
        if is_main_process():
            action()


@contextmanager
def all_alike(together: bool) -> Iterator[None]:
    """What is raised within it on any process, all of them raise; if they are here `together`."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if not together:
            raise
        error = raised
    if together:
        raise_on_all(error)


def raise_on_all(error: Exception | None) -> None:
    """Raise what any process failed with, on all of them; each tells what it met, or None.

    What cannot be sent to other processes, they have in words.
    """
    is_own = error is not None and not isinstance(error, FailedElsewhereError)
    errors = [sent for sent in told(_sendable(error) if is_own else None) if sent is not None]
    if is_own or not errors:
        errors = [error] if error is not None else []
    if errors:
        raise errors[0]


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.dumps(copy.copy(error))
    except Exception:
        return ShardingError(f"process {dist.get_rank()} failed: {type(error).__name__}: {error}")
    return error
