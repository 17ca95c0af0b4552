"""The four sums per unit that every kernel returns, and when fast arithmetic may be believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

SMALLEST: Final = 1e-26
"""Below this a float32 sum of squares has lost terms to underflow."""
LARGEST: Final = 1e30
"""Above this it is close to overflow."""
TANGENTIAL_SHARE: Final = 0.5
"""Where P/c is at least this, c − e²/a loses at most one bit; below it P comes from d itself."""

_NONE: Final = np.empty(0, np.intp)
_DEVICE_BLOCK: Final = 1 << 24
"""Elements an accelerator without a kernel of its own converts to float64 at a time."""


@dataclass(frozen=True)
class UnitSums:
    """Per-unit sums of a change d = w' − w_0.

    Attributes:
        table: float64, shape (4, units): a, e, c and P.
    """

    table: Tensor

    @property
    def before_square(self) -> Tensor:
        """Σ w_0², a in the table."""
        return self.table[0]

    @property
    def dot(self) -> Tensor:
        """Σ d·w_0, e in the table."""
        return self.table[1]

    @property
    def update_square(self) -> Tensor:
        """Σ d², c in the table."""
        return self.table[2]

    @property
    def tangential_square(self) -> Tensor:
        """Σ (d − (e/a) w_0)², P in the table: the part of c that turns the unit."""
        return self.table[3]


def from_array(sums: NDArray[np.float64]) -> UnitSums:
    """UnitSums over an array of shape (4, units), in the order a, e, c, P; nothing is copied."""
    return UnitSums(torch.from_numpy(sums))


def to_host(sums: Tensor) -> Callable[[], NDArray[np.float64]]:
    """Queue the one transfer of sums to host memory; what is returned waits for it alone."""
    if sums.device.type != "cuda":
        return sums.cpu().numpy
    host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
    host.copy_(sums, non_blocking=True)
    copied = queued(sums.device)

    def wait() -> NDArray[np.float64]:
        copied()
        array: NDArray[np.float64] = host.numpy()
        return array

    return wait


def queued(device: torch.device | None = None) -> Callable[[], object]:
    """What waits until a GPU, by default the present one, has done what is queued up to now.

    It waits for the stream of now, without keeping a core busy or holding the interpreter; for
    nothing where no GPU is used.
    """
    cuda: Any = torch.cuda
    if not cuda.is_initialized():
        return lambda: None
    reached = cuda.Event(blocking=True)
    reached.record(cuda.current_stream(device))
    wait: Callable[[], object] = reached.synchronize
    return wait


def on_device(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, queued and not waited for; on the CPU no copy."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fill_tangential(sums: NDArray[np.float64], single: bool) -> NDArray[np.intp]:
    """Set P = c − e²/a from a, e and c, and tell the units where that cannot be believed.

    To be called where numpy does not warn of NaN: a unit of zeros has it as P, and is told.

    Args:
        sums: shape (4, units): a, e, c and room for P.
        single: whether terms were float32, which underflow and overflow early.

    Returns:
        Indices of units to be summed again in float64: almost radial changes, where c − e²/a
        cancels; sums out of float32's range; zeros, NaN and Inf.
    """
    a, e, c, P = sums
    np.multiply(e, e, out=P)
    np.divide(P, a, out=P)
    np.subtract(c, P, out=P)
    squares = sums[0:3:2]
    within = not single or bool(  # NaN is not
        np.minimum.reduce(squares, None) >= SMALLEST and np.maximum.reduce(squares, None) <= LARGEST
    )
    if within and np.minimum.reduce(P / c) >= TANGENTIAL_SHARE:
        return _NONE
    trusted = TANGENTIAL_SHARE * c <= P
    if not within:
        unchanged = (c == 0) & (e == 0)
        trusted &= (a >= SMALLEST) & (a <= LARGEST)
        trusted &= ((c >= SMALLEST) & (c <= LARGEST)) | unchanged
    return np.flatnonzero(~trusted)


def exact_rows(
    before: NDArray[np.float64], after: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    """The definition, in float64: a, e, c and P of each row into the four rows of `out`."""
    with np.errstate(all="ignore"):
        d = after - before
        a, e = np.vecdot(before, before), np.vecdot(d, before)
        out[0], out[1], out[2] = a, e, np.vecdot(d, d)
        d -= np.where(a == 0, 0.0, e / a)[:, None] * before
        out[3] = np.vecdot(d, d)


def exact_tensors(before: Tensor, after: Tensor) -> UnitSums:
    """The same in plain torch on any device with float64, block by block."""
    rows = max(1, _DEVICE_BLOCK // before.shape[1])
    sums = torch.empty((4, before.shape[0]), dtype=torch.float64, device=before.device)
    for start in range(0, before.shape[0], rows):
        block = slice(start, start + rows)
        w = aligned(before[block]).to(torch.float64)
        d = aligned(after[block]).to(torch.float64) - w
        a, e = torch.einsum("nk,nk->n", w, w), torch.einsum("nk,nk->n", d, w)
        sums[0, block], sums[1, block] = a, e
        sums[2, block] = torch.einsum("nk,nk->n", d, d)
        d.addcmul_(w, ratio(e, a).unsqueeze(1), value=-1)
        sums[3, block] = torch.einsum("nk,nk->n", d, d)
    return UnitSums(sums)


def aligned(weight: Tensor) -> Tensor:
    """The weight, copied if its address is no multiple of the element size.

    That happens in a mapped file, and torch's matrix products crash on it.
    """
    return weight if weight.data_ptr() % weight.element_size() == 0 else weight.clone()


def constant(weight: Tensor) -> Tensor:
    """The weight, detached where it is not yet."""
    return weight.detach() if weight.requires_grad else weight


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0 (a unit with no direction)."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)
