"""Counts what would make the host wait for a GPU, on the CPU, where nothing does.

An operation whose result, or whose result's shape, the host must know: a number taken out, a copy
to the host, a comparison as a bool, a mask to select by. The arithmetic behind the reading of
weights is left out: on the CPU it is numpy's, and `tests/integrations/test_transfers.py` counts
its transfers.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

if TYPE_CHECKING:
    from types import FrameType

aten: Any = torch.ops.aten
OPERATIONS: Final = frozenset({
    "_coalesce", "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal",
    "is_nonzero", "linalg_lstsq", "masked_select", "nonzero", "unique_consecutive", "unique_dim",
})  # fmt: skip
METHODS: Final = frozenset({"cpu", "numpy", "tolist", "__array__"})
"""Of tensors, which need no operation on the CPU."""
ARITHMETIC: Final = (
    "_kernels/",
    "measurement.py",
    "decomposition.py",
    "unit_",
    "_arrays.py",
)
INDEXING: Final = ("index", "index_put", "index_put_", "_index_put_impl_")


class Waits:
    """What was met inside its `with`, by the name of the operation and who asked for it."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> Waits:
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Methods(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def note(self, name: str) -> None:
        asker = _asker()
        if asker:
            self.found[f"{name} in {asker}"] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chooses = name in INDEXING and any(
            index.dtype in (torch.bool, torch.uint8)
            for index in tree_flatten(args[1])[0]
            if isinstance(index, torch.Tensor)
        )
        if name in OPERATIONS or chooses:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS and args and isinstance(args[0], torch.Tensor):
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


def _asker() -> str:
    """The file of PEFT or of this package that asked; "" for the arithmetic of this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in ("peft", "dora_dynamics"):
            _, found, inside = path.rpartition(f"/{package}/")
            if found:
                if inside.endswith("without_waiting.py"):
                    break
                return "" if inside.startswith(ARITHMETIC) else f"{package}/{inside}"
        frame = frame.f_back
    return ""
