"""Which path sums which weights."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dora_dynamics._kernels import threads
from dora_dynamics._kernels.sums import UnitSums, constant, exact_tensors, from_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def dense_sums(before: Tensor, after: Tensor) -> UnitSums:
    """Sums of two dense weights of shape (units, features), same dtype and device.

    P is as exact where a change is almost purely radial (weight decay with hardly any learning)
    as elsewhere: there it is taken from d itself and not from c − e²/a.
    """
    return dense_sums_of_all([(before, after)])[0]


def dense_sums_of_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[UnitSums]:
    """`dense_sums` of many pairs at once, in order, in host memory.

    Pairs on one GPU take one launch per dtype and layout and one transfer back.
    """
    sums: dict[int, UnitSums] = {}
    with torch.no_grad():
        for device in dict.fromkeys(before.device for before, _ in pairs):
            here = [i for i, (before, _) in enumerate(pairs) if before.device == device]
            weights = [(constant(pairs[i][0]), constant(pairs[i][1])) for i in here]
            sums.update(zip(here, _sums_on(device, weights), strict=True))
    return [sums[i] for i in range(len(pairs))]


def _sums_on(device: torch.device, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[UnitSums]:
    if device.type == "cpu":
        return cpu_sums(pairs, cpu_path())
    if device.type == "cuda" and find_spec("triton") is not None:
        triton_path = importlib.import_module("dora_dynamics._kernels.triton_path")
        found: list[UnitSums] = triton_path.sums_of_all(pairs)
        return found
    return [exact_tensors(before, after) for before, after in pairs]


def cpu_sums(pairs: Sequence[tuple[Tensor, Tensor]], path: Any) -> list[UnitSums]:
    """Sums of pairs in host memory by one of the CPU paths, all their tasks together."""
    arrays = [np.empty((4, before.shape[0])) for before, _ in pairs]
    elements = sum(before.numel() for before, _ in pairs)
    shared = elements >= path.WORTH_THREADS and threads.workers() >= path.LEAST_THREADS
    tasks = [
        task
        for (before, after), array in zip(pairs, arrays, strict=True)
        for task in path.tasks(before, after, array, shared)
    ]
    threads.run_all(tasks, worth_threads=shared)
    return [from_array(array) for array in arrays]


@cache
def cpu_path() -> Any:
    """The module that sums on the CPU: `numba_path` where numba is installed, else `blocks`."""
    if find_spec("numba") is not None:
        try:
            return importlib.import_module("dora_dynamics._kernels.numba_path")
        except ImportError:  # a numba that does not know this numpy says so when imported
            pass
    return importlib.import_module("dora_dynamics._kernels.blocks")
