"""Where the values of a weight are, and as what: dtype, device, and whose memory it is."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

TORCHS_OWN: Final = (torch.Tensor, torch.nn.Parameter)
"""Kinds of tensors whose memory is where they say."""


def as_loaded(weight: Tensor, stored: Tensor) -> torch.dtype:
    """The dtype a checkpoint's weight had when the model took it in: at most the model's own."""
    wider = weight.dtype.itemsize > stored.dtype.itemsize
    other = weight.dtype.itemsize == stored.dtype.itemsize and weight.dtype != stored.dtype
    return stored.dtype if wider or other else weight.dtype


def extent(tensor: Tensor) -> range:
    """The addresses from the first value of one of torch's own tensors to its last; or none."""
    if type(tensor) not in TORCHS_OWN or not tensor.numel():
        return range(0)
    first = tensor.data_ptr()
    steps = sum((n - 1) * apart for n, apart in zip(tensor.shape, tensor.stride(), strict=True))
    return range(first, first + (steps + 1) * tensor.element_size() if first else 0)


def share_memory(weight: Tensor, stored: Tensor) -> bool:
    """Whether what trains one of these may change the other."""
    return bool(overlapping({"": weight}, [stored]))


def overlapping(weights: Mapping[str, Tensor], others: Iterable[Tensor]) -> list[str]:
    """The weights that have memory in common with any of the others."""
    taken = sorted((where.start, where.stop) for where in map(extent, others) if where)
    ends = list(accumulate((stop for _, stop in taken), max))  # of all that begin no later
    found = []
    for name, weight in weights.items():
        here = extent(weight)
        before = bisect_left(taken, (here.stop,))
        if here and before and ends[before - 1] > here.start:
            found.append(name)
    return found


def in_host_memory(weight: Tensor, device: torch.device) -> Tensor:
    """A weight in memory that `device` copies from; pinned for a GPU, which then need not wait."""
    pin = device.type == "cuda"
    if weight.device.type == "cpu" and (weight.is_pinned() or not pin):
        return weight
    copy = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=pin)
    return copy.copy_(weight)


def are_alike(weight: Tensor, stored: Tensor) -> bool:
    """Whether two weights can be compared as they are; both are torch's own kind of tensor."""
    return (
        type(weight) in TORCHS_OWN
        and weight.dtype == stored.dtype
        and weight.shape == stored.shape
        and weight.device == stored.device
    )
