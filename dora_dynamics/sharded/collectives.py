"""What processes tell each other: sums, rank-sized tensors, whether all agree.

Every function here is called by all processes, in the same order, or by none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from dora_dynamics.sharded.holding import ShardingError, held

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


def added(
    vectors: Sequence[NDArray[np.float64]],
    held_elements: Sequence[int],
    elements: Sequence[int],
    device: torch.device,
) -> list[NDArray[np.float64]]:
    """Vectors added up over all processes, in one all-reduce.

    Several processes may hold the same block (a replicated dimension of the mesh, a mesh that is a
    part of a larger one): the elements that are held, added up, tell how many copies there are.

    Args:
        vectors: what the blocks of this process add to each vector.
        held_elements: how many elements of the weight behind each vector this process holds.
        elements: how many elements that weight has.
        device: where the processes exchange tensors.

    Raises:
        ShardingError: a weight is not held as a whole, by all processes together.
    """
    flat = np.concatenate([*vectors, np.asarray(held_elements, dtype=np.float64)])
    buffer = torch.from_numpy(flat).to(device)
    dist.all_reduce(buffer)
    total = buffer.cpu().numpy()
    found = []
    start, counts = 0, total[len(total) - len(vectors) :]
    for vector, count, whole in zip(vectors, counts, elements, strict=True):
        copies, rest = divmod(int(count), whole)
        if rest or copies < 1:
            raise ShardingError(
                f"the processes hold {int(count)} elements of a weight of {whole}: all processes "
                "must follow the same weights (one recorder on each), and hold them as a whole."
            )
        found.append(total[start : start + len(vector)] / copies)
        start += len(vector)
    return found


def joined(tensors: Sequence[DTensor]) -> list[Tensor]:
    """The whole of each tensor, bit by bit, in one all-reduce: meant for what is of rank size.

    Bytes that this process does not hold are zero here, and the largest of all is taken; so any
    sharding, uneven, empty or replicated, is the same case.
    """
    if not tensors:
        return []
    device = device_of(tensors[0])
    sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGNMENT) for tensor in tensors]
    buffer = torch.zeros(_ALIGNMENT * sum(sizes), dtype=torch.uint8, device=device)
    found = []
    start = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        nbytes = tensor.numel() * tensor.element_size()
        whole = buffer[start : start + nbytes].view(tensor.dtype).view(tensor.shape)
        start += _ALIGNMENT * size
        local, offsets = held(tensor)
        spans = zip(offsets, local.shape, strict=True)
        whole[tuple(slice(first, first + count) for first, count in spans)].copy_(local)
        found.append(whole)
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
    return found


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
    error: Exception | None = None
    if is_main_process():
        try:
            action()
        except Exception as raised:
            if not together:
                raise
            error = raised
    if together:
        errors = [error]
        dist.broadcast_object_list(errors, src=0)
        if errors[0] is not None:
            raise errors[0]
