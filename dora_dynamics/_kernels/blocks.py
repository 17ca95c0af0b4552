"""The CPU path of the core install: numpy over blocks that stay in a core's cache.

float32 terms, summed by BLAS over at most 4096 features at a time and in float64 across these;
units whose sums cannot be believed are summed again in float64.
"""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch

from dora_dynamics._kernels.sums import exact_rows, fill_tangential

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Rows = NDArray[np.float32] | NDArray[np.float64]
    _Read = Callable[["_Block"], tuple[Rows, Rows]]
    """Gives w_0 and d of a block."""

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
_IN_NUMPY: Final = (torch.float32, torch.float64)
"""What is summed as it is stored."""

_KEPT: Final = 1 << 20
"""Elements of a weight up to which its plan is kept."""
_KEPT_PLANS: Final = 64
"""How many are kept, at most."""
_NOTHING: Final = (np.empty(0, np.uint8), np.empty(0))

_local = threading.local()
"""By name: a buffer, and its beginning as it was last asked for."""
_plans = threading.local()
"""Plans by shape, made of views of these buffers."""


class _Block(NamedTuple):
    """Part of a weight that stays in the cache; arrays have shape (halves, units, features).

    Attributes:
        here: its rows and columns; columns are words where there are two halves.
        w: room for w_0.
        d: room for d.
        bits: the low and the high halves of w and of d as integers, where there are two halves.
        parts: for at most `_FEATURES` features each, where a, e and c go, shape (halves, units).
    """

    here: tuple[slice, slice]
    w: Rows
    d: Rows
    bits: tuple[NDArray[np.int32], ...]
    parts: list[tuple[Rows, ...]]


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
    return [partial(work, *piece) for piece in pieces(before, after, out, step)]


def pieces(
    before: Any, after: Any, out: NDArray[np.float64], step: int
) -> Iterator[tuple[Any, Any, NDArray[np.float64]]]:
    """What `tasks` is given, tensors or arrays of their rows, cut after every so many units."""
    for start in range(0, len(before), step):
        here = slice(start, start + step)
        yield before[here], after[here], out[:, here]


def block_size(shared: bool) -> int:
    """Elements of a block, by whether several threads work."""
    return _SHARED_BLOCK if shared else _BLOCK


def _sum_rows(before: Tensor, after: Tensor, out: NDArray[np.float64], block: int) -> None:
    double = before.dtype == torch.float64
    halves = 1
    reader: Callable[[Tensor, Tensor], _Read] = _converted
    if _in_words(before) and _in_words(after):
        reader, halves = _halves, 2
    elif before.dtype in _IN_NUMPY and _has_rows(before) and _has_rows(after):
        reader = _as_it_is
    units, features = before.shape
    sums, blocks = _plan(units, features, block, halves, double)
    read = reader(before, after)
    with np.errstate(all="ignore"):
        for one in blocks:
            _sum_block(*read(one), one.parts)
        np.add.reduce(sums.reshape(3, -1, units), axis=1, dtype=np.float64, out=out[:3])
        again = fill_tangential(out, single=not double)
    if len(again):
        sum_exactly(before, after, again, out)


def _plan(
    units: int, features: int, block: int, halves: int, double: bool
) -> tuple[Rows, Iterable[_Block]]:
    """The blocks of a weight, and where their sums go: shape (3, parts, halves, units).

    A model has few different shapes: those of small weights are kept. To make these views anew
    would take a tenth of the time that such a weight takes.
    """
    key = (units, features, block, halves, double)
    plans: dict[Any, tuple[Rows, Iterable[_Block]]] = _plans.__dict__.setdefault("made", {})
    if key in plans:
        return plans[key]
    dtype = np.dtype(np.float64 if double else np.float32)
    width = features // halves
    sums: Rows = np.empty((3, -(-width // _FEATURES), halves, units), dtype)
    blocks = _blocks(units, width, block // halves, sums)
    if units * features > _KEPT:
        return sums, blocks
    made = sums, list(blocks)
    plans = _plans.__dict__.setdefault("made", {})  # a buffer that grew has dropped them
    if len(plans) == _KEPT_PLANS:
        plans.clear()
    plans[key] = made
    return made


def _blocks(units: int, width: int, length: int, sums: Rows) -> Iterator[_Block]:
    halves = sums.shape[2]
    step = -(-units // -(-units * width // length))
    shape = (halves, step, min(width, length))
    rooms = [_scratch(name, shape, sums.dtype) for name in ("w" if halves == 2 else "d", "d")]
    for start in range(0, units, step):
        rows = slice(start, min(start + step, units))
        for left in range(0, width, length):
            columns = slice(left, min(left + length, width))
            w, d = (one[:, : rows.stop - start, : columns.stop - left] for one in rooms)
            bits = (*w.view(np.int32), *d.view(np.int32)) if halves == 2 else ()
            first, end = left // _FEATURES, -(-columns.stop // _FEATURES)
            parts = [tuple(sums[:, part, :, rows]) for part in range(first, end)]
            yield _Block((rows, columns), w, d, bits, parts)


def _sum_block(w: Rows, d: Rows, parts: Sequence[tuple[Rows, ...]]) -> None:
    """The sums a, e and c of a block of shape (halves, units, features).

    `parts` takes them for at most `_FEATURES` features each.
    """
    x, y = w, d
    for part, (a, e, c) in enumerate(parts):
        if len(parts) > 1:
            some = slice(part * _FEATURES, (part + 1) * _FEATURES)
            x, y = w[:, :, some], d[:, :, some]
        np.vecdot(x, x, a)
        np.vecdot(y, x, e)
        np.vecdot(y, y, c)


def _as_it_is(before: Tensor, after: Tensor) -> _Read:
    """Blocks that numpy reads where they lie."""
    first, second = before.numpy(), after.numpy()

    def read(block: _Block) -> tuple[Rows, Rows]:
        w = first[block.here]
        np.subtract(second[block.here], w, block.d[0])
        return w[np.newaxis], block.d

    return read


def _converted(before: Tensor, after: Tensor) -> _Read:
    """Blocks that are converted one by one."""

    def read(block: _Block) -> tuple[Rows, Rows]:
        w, v = as_rows(before[block.here], "u"), as_rows(after[block.here], "v")
        np.subtract(v, w, block.d[0])
        return w[np.newaxis], block.d

    return read


def _halves(before: Tensor, after: Tensor) -> _Read:
    """Blocks of bfloat16: even and odd features become the halves.

    bfloat16 is the upper half of float32: a shift widens the lower of the two values in a word
    and a mask the upper. A sum does not mind the order, and this takes half as many passes.
    """
    first, second = before.view(torch.int32).numpy(), after.view(torch.int32).numpy()

    def read(block: _Block) -> tuple[Rows, Rows]:
        w_words, v_words = first[block.here], second[block.here]
        w_low, w_high, v_low, v_high = block.bits
        np.left_shift(w_words, 16, w_low)
        np.bitwise_and(w_words, _UPPER, w_high)
        np.left_shift(v_words, 16, v_low)
        np.bitwise_and(v_words, _UPPER, v_high)
        np.subtract(block.d, block.w, block.d)
        return block.w, block.d

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
        _plans.__dict__.clear()  # they would hold the smaller buffer
    shaped = room[:size].view(dtype).reshape(shape)
    buffers[name] = room, shaped
    return shaped
