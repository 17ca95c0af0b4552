"""Where the values of a weight are, and as what: dtype, device, and whose memory it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

TORCHS_OWN: Final = (torch.Tensor, torch.nn.Parameter)
"""Kinds of tensors whose memory is where they say."""


def as_loaded(weight: Tensor, stored: Tensor) -> torch.dtype:
    """The dtype a checkpoint's weight had when the model took it in: at most the model's own."""
    wider = weight.dtype.itemsize > stored.dtype.itemsize
    other = weight.dtype.itemsize == stored.dtype.itemsize and weight.dtype != stored.dtype
    return stored.dtype if wider or other else weight.dtype


def address(tensor: Tensor) -> int:
    """Where the values of one of torch's own tensors begin in memory; 0 for any other."""
    return tensor.data_ptr() if type(tensor) in TORCHS_OWN else 0


def share_memory(weight: Tensor, stored: Tensor) -> bool:
    """Whether what trains one of these changes the other."""
    return address(weight) == address(stored) != 0


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
