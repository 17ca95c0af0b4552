"""A pickle reader that can build nothing but data: what torch's distributed metadata needs.

Every class in the pickle becomes an inert `Record` that only remembers what it was made from, so
that opening a file never runs code of the file's choosing. The reader is Python's own, written in
Python: the one in C lets a few bytes claim gigabytes (an index into its memo), and neither minds
a tuple of tuples of tuples that is built in no time and takes forever to hash.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import IO, TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_PACKAGES: Final = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "pathlib")
_STORAGES: Final = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


_HEAVIEST: Final = 1_000_000
"""Values that a tuple may stand for: hashing it takes as many steps."""


class HeavyTupleError(pickle.UnpicklingError):
    """A tuple of the pickle would take too long to hash."""


class Record:
    """An object of the pickle, known only by the state it was made from."""

    state: object = None

    def __init__(self, *_: object) -> None:
        """Take any arguments, as the class this stands for might, and keep none."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """A field of the object, None where it has none of that name."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = state[1]
        return state.get(name) if isinstance(state, dict) else None


class StorageKind:
    """A typed storage as torch's pickles name it, "FloatStorage"; only its dtype matters."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class RestrictedUnpickler(pickle._Unpickler):
    """Reads plain containers, torch dtypes and `Record`s; raises on any other global.

    Args:
        file: the pickle.
        rebuild: called in place of torch's function that makes a tensor of a storage.
        storage: resolves the persistent identifiers that stand for storages.
    """

    stack: list[Any]

    def __init__(
        self,
        file: IO[bytes],
        *,
        rebuild: Callable[..., object] | None = None,
        storage: Callable[[Any], object] | None = None,
    ) -> None:
        super().__init__(file)
        self._weights: dict[int, tuple[object, int]] = {}
        self._rebuild = rebuild
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global of the pickle."""
        if module == "torch":
            if name == "Size":
                return tuple
            value = getattr(torch, name, None)
            if isinstance(value, torch.dtype):
                return value
            if name in _STORAGES:
                return StorageKind(_STORAGES[name])
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2") and self._rebuild is not None:
            return self._rebuild
        if module.startswith(_PACKAGES):
            return Record
        raise pickle.UnpicklingError(f"it needs {module}.{name}")

    def weigh(self) -> None:
        """Refuse the tuple that was just read where it stands for too many values."""
        made = self.stack[-1]
        known = self._weights
        weight = 1 + sum(known[id(x)][1] if id(x) in known else 1 for x in made)
        if weight > _HEAVIEST:
            raise HeavyTupleError("it holds a tuple of too many tuples")
        known[id(made)] = (made, weight)  # kept alive, so that no other has its id

    def persistent_load(self, identifier: Any) -> object:
        """The storage that an identifier stands for."""
        if self._storage is None:
            raise pickle.UnpicklingError("it refers to storages outside itself")
        return self._storage(identifier)


class Weigher(RestrictedUnpickler):
    """Reads any pickle, to see whether another reader can: every object of it is a `Record`."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global of the pickle."""
        return OrderedDict if name == "OrderedDict" else Record

    def persistent_load(self, identifier: Any) -> object:
        """A stand-in for a storage."""
        return Record()


def _weighed(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def load_and_weigh(self: RestrictedUnpickler) -> None:
        load(self)
        self.weigh()

    return load_and_weigh


_LOADERS: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)
RestrictedUnpickler.dispatch = {
    code: _weighed(load) if code in b"t\x85\x86\x87" else load for code, load in _LOADERS.items()
}
