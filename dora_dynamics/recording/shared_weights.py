"""The frozen weights of the model that are W_0 themselves, for as long as nothing trains them."""

from __future__ import annotations

import operator
from itertools import chain
from typing import TYPE_CHECKING

from dora_dynamics.recording.memory import address
from dora_dynamics.recording.optimizers import are_frozen, is_frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.optim import Optimizer


class SharedWeights:
    """Live weights by name, each with its version when it became W_0.

    What is looked at before every step is done by loops that run in C and make no list: the first
    large one after a backward pass makes the allocator tidy up what that has freed.
    """

    def __init__(self) -> None:
        """None yet."""
        self._weights: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._optimized: dict[int, list[int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._weights))

    def add(self, name: str, weight: Tensor, version: int) -> None:
        """This live weight, as it is at this version, is W_0."""
        self._weights[name] = weight
        self._versions[name] = version
        self._optimized.clear()

    def discard(self, name: str) -> None:
        """W_0 is kept elsewhere, if this was it."""
        self._weights.pop(name, None)
        self._versions.pop(name, None)

    def version(self, name: str) -> int:
        """The version at which it was added."""
        return self._versions[name]

    def about_to_train(self, optimizer: Optimizer) -> list[str]:
        """Those that train from now on, before the optimizer's step; W_0 is to be copied.

        So is one in whose memory the optimizer trains another parameter, as `nn.Parameter(w.data)`
        is one; that is looked at where the optimizer has other parameters than before.
        """
        if not self._weights:
            return []
        found = []
        if not are_frozen(self._weights.values()):
            found = [name for name, weight in self._weights.items() if not is_frozen(weight)]
        groups = [group["params"] for group in optimizer.param_groups]
        known = self._optimized.get(id(optimizer), [])
        same = sum(map(len, groups)) == len(known)
        if not (same and all(map(operator.eq, map(id, chain(*groups)), known))):
            parameters = list(chain(*groups))
            own = set(map(id, self._weights.values()))
            trained = {address(p) for p in parameters if id(p) not in own} - {0}
            found += [
                name
                for name, weight in self._weights.items()
                if name not in found and address(weight) in trained
            ]
            self._optimized[id(optimizer)] = list(map(id, parameters))
        return found
