"""What is asked of numpy arrays and of torch tensors alike, so that each formula is written once.

On the CPU arrays are numpy's, whose small operations cost least; on a device they are tensors, and
nothing here waits for them.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray
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


def is_finite(values: Array) -> Array:
    """Which values are neither NaN nor infinite; of a tensor in two operations, not in four."""
    return np.isfinite(values) if isinstance(values, np.ndarray) else values - values == 0


def power_of_two(values: Array) -> Array:
    """The largest power of two up to each of these positive values; 1 for 0."""
    library = library_of(values)
    return library.where(values == 0, 1.0, values / (2.0 * library.frexp(values)[0]))


class Rectangle:
    """Rows of as many values each: the last dimension of what is given."""

    def sums(self, *values: Array) -> list[Array]:
        """Of each array the sum of each row."""
        return [one.sum(-1) for one in values]

    def largest(self, values: Array) -> Array:
        """The largest absolute value of each row."""
        return library_of(values).amax(abs(values), -1)

    def spread(self, numbers: Array) -> Array:
        """A number a row, to be combined with the values of the rows."""
        return numbers[..., None]

    def doubled_ranks(self, values: Array) -> Array:
        """Twice the rank of each value within its row, from 1; ties share their mean.

        Returns:
            For a row of n values, numbers from 1 to 2n − 1, of which the mean is n.
        """
        if isinstance(values, np.ndarray):
            return _numpy_ranks(values)
        return _torch_ranks(values).double()


class Stretches:
    """Rows of several lengths on a device: the last dimension holds one behind the other.

    Rows of one length are neighbours. What is done to each value is then done to all at once, and
    only what is done to rows takes an operation for each length: on a device each is a launch.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        on_device: Callable[[NDArray[np.intp]], Tensor],
    ) -> None:
        """So many rows of so many values each, in this order; `on_device` copies an array there."""
        self._shapes = list(shapes)
        self._sizes = [rows * values for rows, values in shapes]
        values = np.concatenate([np.full(rows, values) for rows, values in shapes])
        self._owners = on_device(np.repeat(np.arange(len(values)), values))

    def sums(self, *values: Array) -> list[Array]:
        """As `Rectangle.sums`."""
        import torch

        together = values[0] if len(values) == 1 else torch.cat(values)
        found = _joined([part.sum(-1) for part in self._parts(together)])
        return list(found.split_with_sizes([len(one) for one in values]))

    def largest(self, values: Array) -> Array:
        """As `Rectangle.largest`."""
        import torch

        norm, highest = torch.linalg.vector_norm, math.inf
        return _joined([norm(part, highest, -1) for part in self._parts(values)])

    def spread(self, numbers: Array) -> Array:
        """As `Rectangle.spread`."""
        return numbers.index_select(-1, self._owners)

    def doubled_ranks(self, values: Array) -> Array:
        """As `Rectangle.doubled_ranks`."""
        return _joined([_torch_ranks(p).flatten(-2) for p in self._parts(values)]).double()

    def _parts(self, values: Array) -> list[Array]:
        """Of the values a view for each length, as its rows."""
        before = values.shape[:-1]
        parts = values.split_with_sizes(self._sizes, -1)
        return [p.view(*before, *shape) for p, shape in zip(parts, self._shapes, strict=True)]


Rows: TypeAlias = "Rectangle | Stretches"
RECTANGLE: Final = Rectangle()


def _joined(parts: list[Tensor]) -> Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _torch_ranks(values: Tensor) -> Tensor:
    import torch

    values = values.contiguous()
    ascending = values.sort(dim=-1).values
    smaller = torch.searchsorted(ascending, values)
    return smaller + torch.searchsorted(ascending, values, right=True)


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
