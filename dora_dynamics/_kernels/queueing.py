"""Sums that are begun now and waited for later: a GPU works while the host goes on."""

from __future__ import annotations

import importlib
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from dora_dynamics._kernels.dispatch import dense_sums_of_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dora_dynamics._kernels.sums import UnitSums


def queue_dense_sums(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], list[UnitSums]]:
    """Start `dense_sums_of_all`; on a GPU wait for nothing, elsewhere sum at once.

    Returns:
        A function that waits for the sums and returns them; it may be called in another thread. It
        holds none of the weights: they may be changed in place, by work queued after this.
    """
    queued: list[tuple[list[int], Callable[[], list[UnitSums]]]] = []
    for device in dict.fromkeys(before.device for before, _ in pairs):
        here = [i for i, (before, _) in enumerate(pairs) if before.device == device]
        weights = [(pairs[i][0].detach(), pairs[i][1].detach()) for i in here]
        if device.type == "cuda" and find_spec("triton") is not None:
            triton_path = importlib.import_module("dora_dynamics._kernels.triton_path")
            with torch.no_grad():
                queued.append((here, triton_path.queue(weights)))
        else:
            queued.append((here, partial(list, dense_sums_of_all(weights))))
    count = len(pairs)

    def finish() -> list[UnitSums]:
        sums: dict[int, UnitSums] = {}
        for here, wait in queued:
            sums.update(zip(here, wait(), strict=True))
        return [sums[i] for i in range(count)]

    return finish
