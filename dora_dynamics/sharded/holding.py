"""What this process holds of a weight that several processes hold together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dora_dynamics._arrays import is_sharded
from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from dora_dynamics.effective import LowRank
    from dora_dynamics.sites import Site


class ShardingError(InputError):
    """A model is sharded in a way that cannot be followed; the message says what can."""


class FailedElsewhereError(ShardingError):
    """Other processes failed at what all of them must do together."""

    def __init__(self, processes: int, ranks: int) -> None:
        """Say which.

        Args:
            processes: how many failed.
            ranks: the sum of their ranks.
        """
        who = f"process {ranks}" if processes == 1 else f"{processes} processes"
        super().__init__(f"{who} cannot, and {'says' if processes == 1 else 'say'} why")


@dataclass(frozen=True)
class Adapted:
    """A LoRA or DoRA on a base weight that is not W_0 (PiSSA moves W_0's leading part away).

    Attributes:
        base: the weight below the adapter, sharded as W_0 is.
        factors: of the adapter, each sharded or whole.
    """

    base: DTensor
    factors: LowRank


@dataclass(frozen=True)
class Block:
    """A block of a site's matrix that this process holds, in the orientation (out, in).

    Attributes:
        weight: the block, on this process's device.
        row: its first row in the whole matrix.
        unit: its first row among the site's own rows.
        columns: index of each of its columns in the whole matrix.
    """

    weight: Tensor
    row: int
    unit: int
    columns: NDArray[np.intp]


def held(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this process holds of a tensor, and at which index of the whole it begins.

    Raises:
        ShardingError: the tensor is a sum whose terms the processes hold.
    """
    if not is_sharded(tensor):
        return tensor, (0,) * tensor.ndim
    if any(placement.is_partial() for placement in tensor.placements):
        raise ShardingError(
            "a followed weight is a sum that the processes have not added up (a partial DTensor): "
            "redistribute it to a sharded or replicated one."
        )
    sharded: Any = tensor.detach()
    (chunk,) = sharded.__create_chunk_list__()  # the protocol of torch.distributed.checkpoint
    return sharded.to_local().detach(), tuple(chunk.offsets)


def blocks(site: Site, tensor: Tensor) -> list[Block]:
    """The blocks of a site that this process holds: one for each range of rows, or none."""
    local, offsets = held(tensor)
    shape = tuple(tensor.shape)
    if site.expert is not None:
        index = site.expert - offsets[0]
        if not 0 <= index < len(local):
            return []
        local, offsets, shape = local[index], offsets[1:], shape[1:]
    if local.numel() == 0:
        return []
    matrix = replace(site, expert=None, rows=None).matrix(local)
    first, columns = _place(site, offsets, local.shape, shape)
    found = []
    unit = 0
    for start, stop in site.rows or ((0, first + len(matrix)),):
        low, high = max(start, first), min(stop, first + len(matrix))
        if low < high:
            rows = matrix[low - first : high - first]
            found.append(Block(rows, low, unit + low - start, columns))
        unit += stop - start
    return found


def _place(
    site: Site, offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]
) -> tuple[int, NDArray[np.intp]]:
    """First row and the columns of what is held, in the whole matrix."""
    spans = [np.arange(start, start + size) for start, size in zip(offsets, sizes, strict=True)]
    if site.kind == "vector":
        return 0, _flattened(spans, shape)
    if site.kind == "filters":
        return offsets[0], _flattened(spans[1:], shape[1:])
    if site.stored_transposed:
        return offsets[1], spans[0]
    return offsets[0], spans[1]


def _flattened(spans: Sequence[NDArray[np.intp]], shape: Sequence[int]) -> NDArray[np.intp]:
    indices: NDArray[np.intp] = np.ravel_multi_index(np.ix_(*spans), tuple(shape)).ravel()
    return indices


def same_place(one: DTensor, other: Tensor) -> bool:
    """Whether this process holds the same part of both."""
    (a, start), (b, other_start) = held(one), held(other)
    return start == other_start and a.shape == b.shape


def placed(weight: Tensor, like: DTensor) -> DTensor | None:
    """The part of `weight` that this process holds of `like`, as a sharded tensor of its own.

    Args:
        weight: the whole weight, or a part of it that is sharded otherwise.
        like: the tensor whose sharding is taken.

    Returns:
        None where this process does not hold all of that part.
    """
    from torch.distributed.tensor import DTensor

    target, wanted = held(like)
    source, start = held(weight)
    begin = [w - s for w, s in zip(wanted, start, strict=True)]
    ends = [b + n for b, n in zip(begin, target.shape, strict=True)]
    if target.numel() == 0:
        own = source.new_empty(target.shape)
    elif any(b < 0 for b in begin) or any(e > n for e, n in zip(ends, source.shape, strict=True)):
        return None
    else:
        own = source[tuple(slice(b, e) for b, e in zip(begin, ends, strict=True))].clone()
    return DTensor.from_local(
        own.contiguous().to(target.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
