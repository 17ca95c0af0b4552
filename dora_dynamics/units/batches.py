"""The units of many weights in one array, and what their summaries need with few operations.

Weights with as many units are taken together, on a device others behind them: there each operation
is a launch, of which all of a model takes some hundred and a few more for each different number of
units in it, and a few numbers a weight go to the host.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from dora_dynamics._arrays import Array, Stretches, library_of
from dora_dynamics._kernels import on_device
from dora_dynamics.units.summary import summary_sums, summary_terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Where the units of one weight are among those of all: from, to."""

_HOST_UNITS: Final = 1 << 13
"""Units taken at a time on the CPU: what is made of them stays in a core's cache."""
_DEVICE_UNITS: Final = 1 << 19
"""Units taken at a time on a device: what is made of them is some 25 arrays as long."""


def batched_sums(units: Sequence[Array], weights: Sequence[Ranges]) -> tuple[Array, list[int]]:
    """`summary_sums` of many weights.

    Args:
        units: the six arrays of the units of all.
        weights: where the units of each are.

    Returns:
        Shape (35, weights), on the same device, and which of the weights each column is of.
    """
    library = library_of(units[0])
    device = None if library is np else units[0].device
    if device is None:
        batches = _batches(tuple(weights))
        found = [summary_sums(summary_terms([a[i] for a in units])) for _, i in batches]
        return library.concatenate(found, 1), [i for some, _ in batches for i in some]
    terms = summary_terms(units)
    stretches = _stretches(tuple(weights), device)
    found = [summary_sums(terms.index_select(1, i), rows) for _, i, rows in stretches]
    return library.concatenate(found, 1), [i for some, _, _ in stretches for i in some]


def length(ranges: Ranges) -> int:
    """How many units there are in the ranges."""
    return sum(stop - start for start, stop in ranges)


def positions(ranges: Ranges) -> NDArray[np.intp]:
    """The units in the ranges."""
    return np.concatenate([np.arange(start, stop) for start, stop in ranges])


def picked(units: NDArray[np.float64], ranges: Ranges) -> NDArray[np.float64]:
    """A copy of the units in the ranges, which are the columns."""
    return np.concatenate([units[:, start:stop] for start, stop in ranges], axis=1)


@lru_cache(maxsize=8)
def _batches(
    weights: tuple[Ranges, ...], most: int | None = None
) -> list[tuple[list[int], NDArray[np.intp]]]:
    """Which weights are taken together, and where their units are, shape (weights, units)."""
    most = _HOST_UNITS if most is None else most
    by_length: dict[int, list[int]] = {}
    for i, ranges in enumerate(weights):
        by_length.setdefault(length(ranges), []).append(i)
    batches = []
    for count, members in by_length.items():
        step = max(1, most // count)
        for first in range(0, len(members), step):
            some = members[first : first + step]
            batches.append((some, np.stack([positions(weights[i]) for i in some])))
    return batches


@lru_cache(maxsize=8)
def _stretches(
    weights: tuple[Ranges, ...], device: torch.device
) -> list[tuple[list[int], torch.Tensor, Stretches]]:
    """The same on a device, several lengths together: weights, where their units are, and rows."""
    together: list[list[tuple[list[int], NDArray[np.intp]]]] = []
    taken = 0
    for batch in _batches(weights, _DEVICE_UNITS):
        taken += batch[1].size
        if not together or taken > _DEVICE_UNITS:
            together.append([])
            taken = batch[1].size
        together[-1].append(batch)
    return [
        (
            [i for some, _ in batches for i in some],
            on_device(np.concatenate([index.ravel() for _, index in batches]), device),
            Stretches([index.shape for _, index in batches], partial(on_device, device=device)),
        )
        for batches in together
    ]
