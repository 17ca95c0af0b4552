"""Running a layer of someone else's without waiting for a GPU in the middle of it.

Some layers look at a number on the device while they compute: whether a system was solvable, how
many entries a mask leaves. Each look makes the host wait, once a layer. Here the usual answer is
taken for granted, and whether it was right is left for later, with the other checks of a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch import Tensor


class WithoutWaiting(TorchFunctionMode):
    """Linear systems are taken to be solvable, and masks to leave everything.

    Entries of sparse matrices are not brought together, which changes no product.

    Attributes:
        right: for each answer that was taken for granted, whether it is right; booleans on their
            devices.
    """

    def __init__(self) -> None:
        """Take nothing for granted yet."""
        super().__init__()
        self.right: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer one call of torch."""
        kwargs = kwargs or {}
        if func is torch.linalg.solve and "out" not in kwargs:
            solution, info = torch.linalg.solve_ex(*args, **kwargs)
            self.right.append((info == 0).all())
            return solution
        if func is torch.Tensor.__getitem__ and _masks_last(args[1]):
            mask = args[1][-1] if isinstance(args[1], tuple) else args[1]
            before = len(args[1]) - 1 if isinstance(args[1], tuple) else 0
            if args[0].shape[before:] == mask.shape:
                self.right.append(mask.all())
                return args[0].clone()
        if func is torch.Tensor.coalesce:
            return args[0]
        if func is torch.sparse.mm and args[0].is_sparse:
            return args[0].to_dense() @ args[1]
        return func(*args, **kwargs)


def _masks_last(index: Any) -> bool:
    """Whether an index is one mask, behind nothing but full slices."""
    *others, last = index if isinstance(index, tuple) else (index,)
    is_mask = isinstance(last, torch.Tensor) and last.dtype == torch.bool and last.ndim == 1
    return is_mask and all(isinstance(o, slice) and o == slice(None) for o in others)
