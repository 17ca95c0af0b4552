"""Plans of launches, kept: a recorder asks for the same addresses again at every step."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")
_KEPT: Final = 8


class Recent(Generic[T]):
    """The last few things that were made, by what they were made from."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made from this, or `make` makes now."""
        found = self._kept.pop(key) if key in self._kept else make()
        self._kept[key] = found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found
