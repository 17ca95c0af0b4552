"""What is asked of numpy arrays and of torch tensors alike, so that each formula is written once.

On the CPU arrays are numpy's, whose small operations cost least; on a device they are tensors, and
nothing here waits for them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from torch.distributed.tensor import DTensor

Array: TypeAlias = Any
"""A float64 (or boolean) array of numpy, or tensor of torch on any device."""


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; no tensor can be one before that module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def are_any_sharded(tensors: Iterable[object]) -> bool:
    """Whether one of them is a DTensor; each class among them is asked once."""
    module = sys.modules.get("torch.distributed.tensor")
    kinds = set() if module is None else set(map(type, tensors))
    return module is not None and any(issubclass(kind, module.DTensor) for kind in kinds)


def library_of(array: Array) -> Any:
    """The module whose functions take this array: numpy or torch."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def as_numbers(values: Array) -> Array:
    """Counts or truths in float64."""
    return values.astype(np.float64) if isinstance(values, np.ndarray) else values.double()


def power_of_two(values: Array) -> Array:
    """The largest power of two up to each of these positive values; 1 for 0."""
    library = library_of(values)
    return library.where(values == 0, 1.0, values / (2.0 * library.frexp(values)[0]))


def doubled_ranks(values: Array) -> Array:
    """Twice the rank of each value within its row, from 1; ties share their mean.

    Args:
        values: shape (…, n); n of the last dimension are a row.

    Returns:
        Numbers from 1 to 2n − 1, of which the mean over a row is n.
    """
    return _numpy_ranks(values) if isinstance(values, np.ndarray) else _torch_ranks(values)


def _torch_ranks(values: Tensor) -> Tensor:
    import torch

    values = values.contiguous()
    ascending = values.sort(dim=-1).values
    smaller = torch.searchsorted(ascending, values)
    not_larger = torch.searchsorted(ascending, values, right=True)
    return (smaller + not_larger).double()


def _numpy_ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    length = values.shape[-1]
    order = np.argsort(values, axis=-1)
    ascending = np.take_along_axis(values, order, -1)
    differs = ascending[..., 1:] != ascending[..., :-1]
    place = np.arange(1.0, 2 * length, 2)
    if not differs.all():
        edge = np.ones((*values.shape[:-1], 1), np.bool_)
        first = np.where(np.concatenate([edge, differs], -1), place, 1.0)
        last = np.where(np.concatenate([differs, edge], -1), place, 2 * length - 1.0)
        first = np.maximum.accumulate(first, axis=-1)
        last = np.minimum.accumulate(last[..., ::-1], axis=-1)[..., ::-1]
        place = (first + last) / 2.0
    found = np.empty(values.shape)
    np.put_along_axis(found, order, np.broadcast_to(place, values.shape), -1)
    return found
