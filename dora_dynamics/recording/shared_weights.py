"""The frozen weights of the model that are W_0 themselves, for as long as nothing trains them."""

from __future__ import annotations

import operator
from itertools import chain
from typing import TYPE_CHECKING

import torch

from dora_dynamics.recording.memory import TORCHS_OWN, overlapping
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
        self._optimized: dict[int, tuple[list[int], list[int]]] = {}
        """By optimizer: who its parameters are, where that matters, and where they are."""

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def __len__(self) -> int:
        return len(self._weights)

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
        is one; that is looked at where the optimizer has other parameters than before, or theirs
        are elsewhere.
        """
        found = []
        if not are_frozen(self._weights.values()):
            found = [name for name, weight in self._weights.items() if not is_frozen(weight)]
        groups = [group["params"] for group in optimizer.param_groups]
        identities, addresses = self._optimized.get(id(optimizer), ([], []))
        if not (
            sum(map(len, groups)) == len(addresses or identities)
            and all(map(operator.eq, identities, map(id, chain(*groups))))
            and all(map(operator.eq, addresses, map(torch.Tensor.data_ptr, chain(*groups))))
        ):
            parameters = list(chain(*groups))
            own = set(map(id, self._weights.values()))
            others = [parameter for parameter in parameters if id(parameter) not in own]
            found += [n for n in overlapping(self._weights, others) if n not in found]
            plain = all(type(parameter) in TORCHS_OWN for parameter in parameters)
            addresses = [parameter.data_ptr() for parameter in parameters] if plain else []
            enough = plain and len(others) == len(parameters)
            identities = [] if enough else list(map(id, parameters))
            self._optimized[id(optimizer)] = identities, addresses
        return found
