"""W_0 of sharded weights: sharded as they are, each process its own part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from dora_dynamics._arrays import is_sharded
from dora_dynamics.sharded.collectives import device_of, told
from dora_dynamics.sharded.holding import ShardingError, held, placed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.distributed.tensor import DTensor

_META: Final = "meta"


@dataclass(frozen=True)
class _Said:
    """What a process says about the weights it follows.

    Attributes:
        names: the tensors, in order.
        digests: of each W_0 that it has as a whole: two processes that have the same have the
            same digest. None where it has a part.
    """

    names: tuple[str, ...]
    digests: tuple[str | None, ...]


def settled(weights: Mapping[str, Tensor], stored: Mapping[str, DTensor]) -> dict[str, DTensor]:
    """W_0 of each weight, sharded as the live weight is now.

    W_0 that was taken before the model was sharded is whole, and each process keeps its part.
    Where the processes do not have the same (only the first has loaded the weights, as with
    Accelerate's `cpu_ram_efficient_loading`), the first one's is scattered.

    Args:
        weights: W_0 as each process has it, by `Site.tensor`: whole, or sharded.
        stored: the live weights, of the same names.

    Raises:
        ShardingError: the processes follow different weights, or the model was sharded in another
            way when W_0 was taken.
    """
    said = told(_Said(tuple(stored), tuple(_digest(weights[name]) for name in stored)))
    if any(other.names != said[0].names for other in said):
        raise ShardingError(
            "the processes follow different weights (the stages of a pipeline, say): give all of "
            "them the same model and targets."
        )
    found = {}
    for position, (name, live) in enumerate(stored.items()):
        digests = [other.digests[position] for other in said]
        if digests[0] == _META:
            raise ShardingError(
                f"{name} had no values when the recorder was made (it was on the meta device): "
                "make it after the weights are loaded, or pass baseline=."
            )
        weight = weights[name]
        if len(set(digests)) > 1:
            weight = _from_the_first(weight, live)
        part = placed(weight, live)
        if part is None:
            raise ShardingError(
                f"{name} is sharded in another way than when the baseline was taken: make the "
                "recorder after the model is sharded."
            )
        found[name] = part
    return found


def all_equal(weights: Mapping[str, Tensor], stored: Mapping[str, DTensor]) -> set[str]:
    """The names of the weights that equal the live ones on every process."""
    mine = [
        weights[name].dtype == live.dtype and torch.equal(held(weights[name])[0], held(live)[0])
        for name, live in stored.items()
    ]
    by_name = zip(*told(mine), strict=True)
    return {name for name, same in zip(stored, by_name, strict=True) if all(same)}


def _digest(weight: Tensor) -> str | None:
    """Of the dtype, the shape and three sums: what was never loaded has another one."""
    if is_sharded(weight):
        return None
    if weight.is_meta:
        return _META
    flat = weight.detach().flatten()
    sums = [
        float(torch.sum(flat, dtype=torch.float64)),
        float(torch.linalg.vector_norm(flat, dtype=torch.float64)),
        float(torch.sum(flat[::3], dtype=torch.float64)),
    ]
    return repr((str(weight.dtype), tuple(weight.shape), sums))


def _from_the_first(weight: Tensor, live: DTensor) -> Tensor:
    """The first process's W_0, whole, for as long as a part of it is taken."""
    dtype = told(weight.dtype)[0]
    whole = torch.empty(live.shape, dtype=dtype, device=device_of(live))
    if torch.distributed.get_rank() == 0:
        whole.copy_(weight)
    torch.distributed.broadcast(whole, src=0)
    return whole
