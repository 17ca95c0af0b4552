"""Sums that are begun now and stay on their device, and what is brought to host memory together."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from dora_dynamics._kernels import low_rank
from dora_dynamics._kernels.dispatch import dense_sums_of_all
from dora_dynamics._kernels.sums import UnitSums, constant, exact_tensors, to_host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from dora_dynamics._kernels.low_rank_update import LowRankUpdate


class Transfer:
    """Results on any devices, brought to host memory together: once from each device.

    All are added, then `start` is called, then each may be had; that waits, in any thread.
    """

    def __init__(self) -> None:
        """Begin with no results."""
        self._results: dict[torch.device, list[Tensor]] = {}
        self._arrived: dict[torch.device, Callable[[], NDArray[Any]]] = {}

    def add(self, result: Tensor) -> Callable[[], NDArray[np.float64]]:
        """Take a float64 result along; what is returned gives it in host memory."""
        results = self._results.setdefault(result.device, [])
        first = sum(other.numel() for other in results)
        results.append(result)
        return partial(self._get, result.device, first, result.shape)

    def start(self) -> None:
        """Queue the transfer of everything that was added."""
        for device, results in self._results.items():
            self._arrived[device] = to_host(torch.cat([r.reshape(-1) for r in results]))
        self._results.clear()

    def _get(self, device: torch.device, first: int, shape: torch.Size) -> NDArray[np.float64]:
        return self._arrived[device]()[first : first + shape.numel()].reshape(shape)


@dataclass(frozen=True)
class QueuedSums:
    """The sums of some weights, on the device of these weights.

    Attributes:
        which: the positions of these weights among those that were given.
        units: how many units each has.
        sums: shape (4, units of all), the fields of `UnitSums`; numpy's on the CPU, else a tensor
            that is filled by what was queued. It refers to none of the weights: they may be
            changed in place, by work queued after this.
    """

    which: list[int]
    units: list[int]
    sums: NDArray[np.float64] | Tensor


def queue_dense_sums(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[QueuedSums]:
    """Start `dense_sums_of_all`; on a GPU wait for nothing, on the CPU sum at once."""
    queued = []
    for device in dict.fromkeys(before.device for before, _ in pairs):
        here = [i for i, (before, _) in enumerate(pairs) if before.device == device]
        weights = [(constant(pairs[i][0]), constant(pairs[i][1])) for i in here]
        units = [before.shape[0] for before, _ in weights]
        found: NDArray[np.float64] | Tensor
        with torch.no_grad():
            if device.type == "cpu":
                found = _on_host(dense_sums_of_all(weights))
            elif _has_kernels(device):
                triton_path = importlib.import_module("dora_dynamics._kernels.triton_path")
                found, _ = triton_path.start(weights)
            else:
                found = _joined([exact_tensors(before, after) for before, after in weights])
        queued.append(QueuedSums(here, units, found))
    return queued


def queue_low_rank_sums(updates: Sequence[LowRankUpdate]) -> list[QueuedSums]:
    """Start `low_rank_sums_of_all`, as `queue_dense_sums`."""
    queued = []
    for device in dict.fromkeys(update.before.device for update in updates):
        here = [i for i, update in enumerate(updates) if update.before.device == device]
        fast: list[int] = []
        found: NDArray[np.float64] | Tensor
        with torch.no_grad():
            if _has_kernels(device):
                path = importlib.import_module("dora_dynamics._kernels.triton_low_rank")
                fast = [i for i in here if path.fits(updates[i])]
                if fast:
                    found, first = path.queue([updates[i] for i in fast])
                    as_laid = [fast[i] for i in sorted(range(len(fast)), key=first.__getitem__)]
                    queued.append(QueuedSums(as_laid, _units(updates, as_laid), found))
            rest = [i for i in here if i not in fast]
            if rest:
                some = [updates[i] for i in rest]
                found = (
                    _on_host(low_rank.low_rank_sums_of_all(some))
                    if device.type == "cpu"
                    else _joined([low_rank.plain_sums(update) for update in some])
                )
                queued.append(QueuedSums(rest, _units(updates, rest), found))
    return queued


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


def _units(updates: Sequence[LowRankUpdate], which: Sequence[int]) -> list[int]:
    return [updates[i].before.shape[0] for i in which]


def _on_host(every: Sequence[UnitSums]) -> NDArray[np.float64]:
    return _joined(every).numpy()


def _joined(every: Sequence[UnitSums]) -> Tensor:
    return torch.cat([sums.table for sums in every], dim=1)
