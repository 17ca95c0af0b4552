"""The CPU path of the core install: numpy over blocks that stay in a core's cache.

float32 terms, summed by BLAS over at most 4096 features at a time and in float64 across these;
units whose sums cannot be believed are summed again in float64.
"""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from dora_dynamics._kernels.sums import exact_rows, fill_tangential

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    Rows = NDArray[np.float32] | NDArray[np.float64]
    _Read = Callable[[slice, slice], tuple[Rows, Rows]]
    """Gives w_0 and d of these rows and columns; each has shape (halves, units, features)."""

_BLOCK: Final = 3 << 15
"""Elements of a block where one thread works: w_0 and d (768 KiB in float32) stay in its cache."""
_SHARED_BLOCK: Final = 1 << 20
"""Where several work. Each of numpy's calls then lasts some 0.2 ms, well above the time in which a
thread wakes up and has Python's lock again; with shorter ones the threads keep the lock from each
other and are slower than one alone."""
WORTH_THREADS: Final = 1 << 21
"""Elements from which threads pay."""
LEAST_THREADS: Final = 3
"""Threads from which they pay: their blocks are too large for the cache and cost half as much
again, which two hardly make up for."""
_FEATURES: Final = 4096
"""Features that BLAS sums in float32; float64 beyond."""
_CONVERSION: Final = (1 << 15) - 1
"""Elements torch converts at a time: from 2¹⁵ on it would wake its own threads."""
_COLUMN_ROWS: Final = 64
"""Features summed in float32 where units are columns of memory."""
_COLUMN_UNITS: Final = 512
"""Units of a task there, at least."""
_COLUMN_TASK: Final = 1 << 18
"""Elements of a task there, about."""
_UPPER: Final = -1 << 16
"""The upper half of a 32-bit word."""
_LINE: Final = 64
"""Bytes of a line of the cache, where buffers begin: numpy's own may begin within one, and take
up to twice as long to fill."""
_SINGLE: Final = np.dtype(np.float32)
_DOUBLE: Final = np.dtype(np.float64)
_IN_NUMPY: Final = (torch.float32, torch.float64)
"""What is summed as it is stored."""

_NOTHING: Final = (np.empty(0, np.uint8), np.empty(0))

_local = threading.local()
"""By name: a buffer, and its beginning as it was last asked for."""


def tasks(
    before: Tensor, after: Tensor, out: NDArray[np.float64], shared: bool
) -> list[Callable[[], None]]:
    """Independent pieces of work that together fill `out`, shape (4, units), with the sums.

    Args:
        before: shape (units, features).
        after: the same.
        out: shape (4, units).
        shared: whether several threads will do the work.
    """
    units, features = before.shape
    by_column = features > 1 and units > 1 and before.stride(0) == 1 == after.stride(0)
    if by_column:
        work: Callable[..., None] = _sum_columns
        step = max(_COLUMN_TASK // features, min(units, _COLUMN_UNITS))
    else:
        work = partial(_sum_rows, block=block_size(shared))
        step = max(1, _SHARED_BLOCK // features) if shared else units
    if step >= units:
        return [partial(work, before, after, out)]
    return [
        partial(
            work,
            before[start : start + step],
            after[start : start + step],
            out[:, start : start + step],
        )
        for start in range(0, units, step)
    ]


def block_size(shared: bool) -> int:
    """Elements of a block, by whether several threads work."""
    return _SHARED_BLOCK if shared else _BLOCK


def _sum_rows(before: Tensor, after: Tensor, out: NDArray[np.float64], block: int) -> None:
    units, features = before.shape
    double = before.dtype == torch.float64
    step = -(-units // -(-units * features // block))
    reader: Callable[[Tensor, Tensor, Rows], _Read] = _converted
    width, length, halves = features, block, 1
    if _in_words(before) and _in_words(after):
        reader, width, length, halves = _halves, features // 2, block // 2, 2
    elif before.dtype in _IN_NUMPY and _has_rows(before) and _has_rows(after):
        reader = _as_it_is
    room = _scratch("d", (halves, step, min(width, length)), _DOUBLE if double else _SINGLE)
    read = reader(before, after, room)
    sums = np.empty((3, -(-width // _FEATURES), halves, units), room.dtype)
    with np.errstate(all="ignore"):
        for start in range(0, units, step):
            rows = slice(start, start + step)
            for left in range(0, width, length):
                w, d = read(rows, slice(left, left + length))
                _sum_block(w, d, sums[:, left // _FEATURES :, :, rows])
        np.add.reduce(sums.reshape(3, -1, units), axis=1, dtype=np.float64, out=out[:3])
        again = fill_tangential(out, single=not double)
    if len(again):
        sum_exactly(before, after, again, out)


def _sum_block(w: Rows, d: Rows, sums: Rows) -> None:
    """The sums a, e and c of a block of shape (halves, units, features).

    `sums` has shape (3, parts of at most `_FEATURES` features, halves, units), or more parts.
    """
    x, y = w, d
    for part, low in enumerate(range(0, w.shape[2], _FEATURES)):
        a, e, c = sums[:, part]
        if w.shape[2] > _FEATURES:
            x, y = w[:, :, low : low + _FEATURES], d[:, :, low : low + _FEATURES]
        np.vecdot(x, x, a)
        np.vecdot(y, x, e)
        np.vecdot(y, y, c)


def _as_it_is(before: Tensor, after: Tensor, room: Rows) -> _Read:
    """Blocks that numpy reads where they lie."""
    w_0, w_1 = before.numpy()[np.newaxis], after.numpy()[np.newaxis]

    def read(rows: slice, columns: slice) -> tuple[Rows, Rows]:
        w = w_0[:, rows, columns]
        return w, np.subtract(w_1[:, rows, columns], w, room[:, : w.shape[1], : w.shape[2]])

    return read


def _converted(before: Tensor, after: Tensor, _room: Rows) -> _Read:
    """Blocks that are converted one by one."""

    def read(rows: slice, columns: slice) -> tuple[Rows, Rows]:
        w, v = as_rows(before[rows, columns], "w"), as_rows(after[rows, columns], "v")
        return w[np.newaxis], np.subtract(v, w, _scratch("v", v.shape, v.dtype))[np.newaxis]

    return read


def _halves(before: Tensor, after: Tensor, room: Rows) -> _Read:
    """Blocks of bfloat16: even and odd features become the halves.

    bfloat16 is the upper half of float32: a shift widens the lower of the two values in a word
    and a mask the upper. A sum does not mind the order, and this takes half as many passes.
    """
    words = [weight.view(torch.int32).numpy() for weight in (before, after)]
    whole = [_scratch("w", room.shape, _SINGLE), room]
    bits = [tuple(values.view(np.int32)) for values in whole]

    def read(rows: slice, columns: slice) -> tuple[Rows, Rows]:
        found = []
        for source, values, (lower, upper) in zip(words, whole, bits, strict=True):
            block = source[rows, columns]
            if block.shape != lower.shape:  # the last of its row or column
                part = (slice(block.shape[0]), slice(block.shape[1]))
                values, lower, upper = values[:, *part], lower[part], upper[part]
            np.left_shift(block, 16, lower)
            np.bitwise_and(block, _UPPER, upper)
            found.append(values)
        w, v = found
        return w, np.subtract(v, w, v)

    return read


def _in_words(weight: Tensor) -> bool:
    """Whether bfloat16 values lie without a gap, two of a unit in each aligned 32-bit word."""
    return (
        weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.shape[1] % 2 == 0
        and weight.data_ptr() % 4 == 0
    )


def _sum_columns(before: Tensor, after: Tensor, out: NDArray[np.float64]) -> None:
    """Units are contiguous and features strided, as in a Conv1D: sums down the columns."""
    out[:3] = 0.0
    before_columns, after_columns = before.T, after.T
    with np.errstate(all="ignore"):
        for start in range(0, before.shape[1], _COLUMN_ROWS):
            rows = slice(start, start + _COLUMN_ROWS)
            w = as_rows(before_columns[rows], "w")
            v = as_rows(after_columns[rows], "v")
            d = np.subtract(v, w, out=_scratch("v", w.shape, w.dtype))
            product = np.multiply(w, w, out=_scratch("product", w.shape, w.dtype))
            out[0] += np.add.reduce(product, axis=0)
            out[1] += np.add.reduce(np.multiply(d, w, out=product), axis=0)
            out[2] += np.add.reduce(np.multiply(d, d, out=product), axis=0)
        again = fill_tangential(out, single=before.dtype != torch.float64)
    if len(again):
        sum_exactly(before, after, again, out)


def add_squares(weight: Tensor, out: NDArray[np.float64]) -> None:
    """Add Σ w² of each row to `out`, in float64."""
    with np.errstate(all="ignore"):
        for start in range(0, weight.shape[1], _FEATURES):
            w = as_rows(weight[:, start : start + _FEATURES], "w", torch.float64)
            out += np.vecdot(w, w)


def sum_exactly(
    before: Tensor, after: Tensor, units: NDArray[np.intp], out: NDArray[np.float64]
) -> None:
    """Sum the given units again, in float64."""
    step = max(1, _BLOCK // before.shape[1])
    for start in range(0, len(units), step):
        some = units[start : start + step]
        first, last = int(some[0]), int(some[-1])
        together = last - first + 1 == len(some)
        index = slice(first, last + 1) if together else torch.from_numpy(some)
        w = as_rows(before[index], "w", torch.float64)
        v = as_rows(after[index], "v", torch.float64)
        sums = np.empty((4, len(some)))
        exact_rows(w, v, sums)  # type: ignore[arg-type]
        out[:, some] = sums


def as_rows(weight: Tensor, buffer: str, dtype: torch.dtype | None = None) -> Rows:
    """A matrix as numpy reads it fast: a view where it can be, else converted into a buffer.

    Args:
        weight: any floating-point matrix in memory, with any strides and alignment.
        buffer: name of this thread's buffer to convert into; the next use of it overwrites.
        dtype: what to convert to; by default float64 for float64 and float32 for the rest.
    """
    if dtype is None:
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows, columns = weight.shape
    if weight.dtype == dtype and _has_rows(weight):
        view: Rows = weight.numpy()
        return view
    array: Rows = _scratch(buffer, (rows, columns), np.dtype(str(dtype).removeprefix("torch.")))
    if (weight.dtype, dtype) == (torch.bfloat16, torch.float32) and is_aligned(weight):
        words = array.view(np.uint32)
        np.copyto(words, weight.view(torch.uint16).numpy())
        np.left_shift(words, 16, out=words)
        return array
    if weight.dtype in _IN_NUMPY and is_aligned(weight):
        np.copyto(array, weight.numpy())
        return array
    converted = torch.from_numpy(array)
    width = min(columns, _CONVERSION)
    height = max(1, _CONVERSION // width)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            part = (slice(top, top + height), slice(left, left + width))
            converted[part].copy_(weight[part])
    return array


def _has_rows(weight: Tensor) -> bool:
    """Whether numpy reads its rows fast where they are."""
    return is_aligned(weight) and (weight.shape[1] == 1 or weight.stride(1) == 1)


def is_aligned(weight: Tensor) -> bool:
    """Whether the data start at a multiple of the element size; in a mapped file they may not."""
    return weight.data_ptr() % weight.element_size() == 0


def _scratch(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """This thread's buffer of that name: fresh memory would cost a page fault per page."""
    buffers = _local.__dict__
    room, shaped = buffers.get(name, _NOTHING)
    if shaped.shape == shape and shaped.dtype == dtype:
        return shaped
    size = math.prod(shape) * dtype.itemsize
    if room.nbytes < size:
        room = np.empty(size + _LINE, np.uint8)
        first = -room.ctypes.data % _LINE
        room = room[first : first + size]
    shaped = room[:size].view(dtype).reshape(shape)
    buffers[name] = room, shaped
    return shaped
