"""Sums that are begun now and waited for later, and brought to host memory together."""

from __future__ import annotations

import importlib
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from dora_dynamics._kernels import low_rank
from dora_dynamics._kernels.dispatch import dense_sums_of_all
from dora_dynamics._kernels.sums import UnitSums, exact_tensors, to_host

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from dora_dynamics._kernels.low_rank import LowRankUpdate


class Transfer:
    """Results on any devices, brought to host memory together: once from each device.

    All are added, then `start` is called, then each may be had; that waits, in any thread.

    Attributes:
        needs_weights: whether results must be had before any weight is changed: those of low-rank
            updates on a GPU, which are summed again if float32 was not enough.
    """

    def __init__(self) -> None:
        """Begin with no results."""
        self.needs_weights = False
        self._results: dict[torch.device, list[Tensor]] = {}
        self._arrived: dict[torch.device, Callable[[], NDArray[Any]]] = {}

    def add(self, result: Tensor) -> Callable[[], Tensor]:
        """Take a result along; what is returned gives it in float64, in host memory."""
        result = result.detach().to(torch.float64, copy=True)
        if result.device.type == "cpu":
            return lambda: result
        results = self._results.setdefault(result.device, [])
        first = sum(other.numel() for other in results)
        results.append(result)
        return partial(self._get, result.device, first, result.shape)

    def start(self) -> None:
        """Queue the transfer of everything that was added."""
        with torch.no_grad():
            for device, results in self._results.items():
                self._arrived[device] = to_host(torch.cat([r.reshape(-1) for r in results]))
        self._results.clear()

    def _get(self, device: torch.device, first: int, shape: torch.Size) -> Tensor:
        host = torch.from_numpy(self._arrived[device]())
        return host[first : first + shape.numel()].view(shape)


def queue_dense_sums(
    pairs: Sequence[tuple[Tensor, Tensor]], transfer: Transfer
) -> Callable[[], list[UnitSums]]:
    """Start `dense_sums_of_all`; on a GPU wait for nothing, on the CPU sum at once.

    Returns:
        A function that gives the sums once the transfer is started; it may be called in another
        thread. It holds none of the weights: they may be changed in place, by work queued after
        this.
    """
    queued: list[tuple[list[int], Callable[[], list[UnitSums]]]] = []
    for device in dict.fromkeys(before.device for before, _ in pairs):
        here = [i for i, (before, _) in enumerate(pairs) if before.device == device]
        weights = [(pairs[i][0].detach(), pairs[i][1].detach()) for i in here]
        with torch.no_grad():
            if device.type == "cpu":
                queued.append((here, partial(list, dense_sums_of_all(weights))))
            elif device.type == "cuda" and find_spec("triton") is not None:
                triton_path = importlib.import_module("dora_dynamics._kernels.triton_path")
                sums, units = triton_path.start(weights)
                queued.append((here, partial(_split, transfer.add(sums), units)))
            else:
                every = [exact_tensors(before, after) for before, after in weights]
                queued.append((here, _joined(every, transfer)))
    return partial(_in_order, queued, len(pairs))


def queue_low_rank_sums(
    updates: Sequence[LowRankUpdate], transfer: Transfer
) -> Callable[[], list[UnitSums]]:
    """Start `low_rank_sums_of_all`, as `queue_dense_sums`; see `Transfer.needs_weights`."""
    queued: list[tuple[list[int], Callable[[], list[UnitSums]]]] = []
    for device in dict.fromkeys(update.before.device for update in updates):
        here = [i for i, update in enumerate(updates) if update.before.device == device]
        fast: list[int] = []
        with torch.no_grad():
            if device.type == "cpu":
                found = low_rank.low_rank_sums_of_all([updates[i] for i in here])
                queued.append((here, partial(list, found)))
                continue
            if device.type == "cuda" and find_spec("triton") is not None:
                path = importlib.import_module("dora_dynamics._kernels.triton_low_rank")
                fast = [i for i in here if path.fits(updates[i])]
            if fast:
                some = [updates[i] for i in fast]
                sums, _ = path.queue(some)
                units = [update.before.shape[0] for update in some]
                finish = partial(_believed, partial(_split, transfer.add(sums), units), some)
                transfer.needs_weights = True
                queued.append((fast, finish))
            rest = [i for i in here if i not in fast]
            if rest:
                every = [low_rank.plain_sums(updates[i]) for i in rest]
                queued.append((rest, _joined(every, transfer)))
    return partial(_in_order, queued, len(updates))


def _joined(every: Sequence[UnitSums], transfer: Transfer) -> Callable[[], list[UnitSums]]:
    """Sums that are on a device, to be had from the transfer."""
    joined = torch.cat([torch.stack(_fields(sums)) for sums in every], dim=1)
    return partial(_split, transfer.add(joined), [len(sums.dot) for sums in every])


def _fields(sums: UnitSums) -> tuple[Tensor, ...]:
    return (sums.before_square, sums.dot, sums.update_square, sums.tangential_square)


def _split(get: Callable[[], Tensor], units: Sequence[int]) -> list[UnitSums]:
    return [UnitSums(*part) for part in torch.split(get(), list(units), dim=1)]


def _believed(
    finish: Callable[[], list[UnitSums]], updates: Sequence[LowRankUpdate]
) -> list[UnitSums]:
    """The sums, and those for which float32 was not enough summed again."""
    return [
        sums if low_rank.is_believable(sums) else low_rank.plain_sums(update)
        for sums, update in zip(finish(), updates, strict=True)
    ]


def _in_order(
    queued: Sequence[tuple[list[int], Callable[[], list[UnitSums]]]], count: int
) -> list[UnitSums]:
    sums: dict[int, UnitSums] = {}
    for here, wait in queued:
        sums.update(zip(here, wait(), strict=True))
    return [sums[i] for i in range(count)]
