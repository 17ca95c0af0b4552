"""The CPU path of the extra `fast`: one pass per row, compiled by numba.

float32 terms in float32 lanes over at most `_CHUNK` features, float64 across chunks. A row whose
sums cannot be believed is summed again in float64 while it is still in the cache.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from dora_dynamics._kernels import blocks
from dora_dynamics._kernels.sums import LARGEST, SMALLEST, TANGENTIAL_SHARE, fill_tangential

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

_CHUNK: Final = 2048
"""Features a lane sums in float32: at most 64 of them for eight lanes unrolled four times."""
_COLUMN_ROWS: Final = 64
"""Features summed in float32 where units are columns of memory."""
_PANEL: Final = 512
"""Units summed together there: their sums stay in the innermost cache."""
_STORAGE: Final = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""What numba sees: it knows no half precision, so bits, their sign telling which of the two."""
WORTH_THREADS: Final = 1 << 19
"""Elements from which threads pay; a smaller weight is summed in the time of waking one."""
LEAST_THREADS: Final = 2
"""Threads from which they pay."""
_TASK: Final = 1 << 18
"""Elements of a task: tens of microseconds of work, above the cost of handing it to a thread."""
_FAST: Final = {"reassoc", "contract", "nsz"}
"""Sums may be reordered, so that they vectorise; NaN and Inf keep their meaning."""


def _widen(context: Any, bits: Any) -> Any:
    """The value of one stored element: float64 as it is, all else float32."""
    wide = types.float64 if bits == types.float64 else types.float32

    def emit(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if signature.args[0] == types.uint16:
            word = ir.IntType(32)
            shifted = builder.shl(builder.zext(value, word), ir.Constant(word, 16))
            return builder.bitcast(shifted, ir.FloatType())
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return wide(bits), emit


def _zero(context: Any, bits: Any) -> Any:
    """Zero in the type that `_widen` gives."""
    double = bits == types.float64

    def emit(_context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.DoubleType() if double else ir.FloatType(), 0.0)

    return (types.float64 if double else types.float32)(bits), emit


widen: Any = intrinsic(_widen)
zero: Any = intrinsic(_zero)


def _sum_chunk(w: Any, v: Any) -> Any:
    a = zero(w[0])
    e = zero(w[0])
    c = zero(w[0])
    for j in range(w.size):
        x = widen(w[j])
        d = widen(v[j]) - x
        a += x * x
        e += d * x
        c += d * d
    return a, e, c


def _sum_row_exactly(w: Any, v: Any) -> Any:
    a = 0.0
    e = 0.0
    c = 0.0
    for j in range(w.size):
        x = np.float64(widen(w[j]))
        d = np.float64(widen(v[j])) - x
        a += x * x
        e += d * x
        c += d * d
    along = 0.0 if a == 0.0 else e / a
    tangential = 0.0
    for j in range(w.size):
        x = np.float64(widen(w[j]))
        p = np.float64(widen(v[j])) - x - along * x
        tangential += p * p
    return a, e, c, tangential


def _sum_rows(before: Any, after: Any, features: int, single: bool, out: Any) -> None:
    """Rows of C-contiguous arrays whose first `features` columns count."""
    for i in range(before.shape[0]):
        a = 0.0
        e = 0.0
        c = 0.0
        for start in range(0, features, _CHUNK):
            stop = min(start + _CHUNK, features)
            x, y, z = sum_chunk(before[i, start:stop], after[i, start:stop])
            a += np.float64(x)
            e += np.float64(y)
            c += np.float64(z)
        tangential = c - (0.0 if a == 0.0 else e * e / a)
        trusted = tangential >= TANGENTIAL_SHARE * c
        if single and trusted:
            trusted = (
                a >= SMALLEST
                and a <= LARGEST
                and ((c >= SMALLEST and c <= LARGEST) or (c == 0.0 and e == 0.0))
            )
        if not trusted:
            a, e, c, tangential = sum_row_exactly(before[i, :features], after[i, :features])
        out[0, i] = a
        out[1, i] = e
        out[2, i] = c
        out[3, i] = tangential


def _add_row(w: Any, v: Any, a: Any, e: Any, c: Any) -> None:
    for j in range(w.size):
        x = widen(w[j])
        d = widen(v[j]) - x
        a[j] += x * x
        e[j] += d * x
        c[j] += d * d


def _add_two_rows(w: Any, v: Any, w_next: Any, v_next: Any, a: Any, e: Any, c: Any) -> None:
    for j in range(w.size):
        x, y = widen(w[j]), widen(w_next[j])
        d, f = widen(v[j]) - x, widen(v_next[j]) - y
        a[j] += x * x + y * y
        e[j] += d * x + f * y
        c[j] += d * d + f * f


def _sum_columns(before: Any, after: Any, panel: Any, out: Any) -> None:
    """Sums down the columns of arrays of shape (features, units); `panel` is room to work in."""
    features, units = before.shape
    a, e, c = panel[0], panel[1], panel[2]
    for top in range(0, features, _COLUMN_ROWS):
        bottom = min(top + _COLUMN_ROWS, features)
        panel[:, :] = 0
        for i in range(top, bottom - 1, 2):
            add_two_rows(before[i], after[i], before[i + 1], after[i + 1], a, e, c)
        if (bottom - top) % 2:
            add_row(before[bottom - 1], after[bottom - 1], a, e, c)
        for j in range(units):
            out[0, j] += a[j]
            out[1, j] += e[j]
            out[2, j] += c[j]


_compile: Any = njit(nogil=True, cache=True, fastmath=_FAST)
sum_chunk: Any = _compile(_sum_chunk)
sum_row_exactly: Any = _compile(_sum_row_exactly)
add_row: Any = _compile(_add_row)
add_two_rows: Any = _compile(_add_two_rows)
sum_rows: Any = _compile(_sum_rows)
sum_columns: Any = _compile(_sum_columns)


def tasks(
    before: Tensor, after: Tensor, out: NDArray[np.float64], shared: bool
) -> list[Callable[[], None]]:
    """As `blocks.tasks`; weights in a layout or alignment not compiled for go to that path."""
    if before.dtype not in _STORAGE or not (blocks.is_aligned(before) and blocks.is_aligned(after)):
        return blocks.tasks(before, after, out, shared)
    units, features = before.shape
    if _has_rows(before) and _has_rows(after):
        step = _task_units(units, features)
        w, v = _whole_rows(before), _whole_rows(after)
        single = before.dtype != torch.float64
        return [
            partial(sum_rows, its_w, its_v, features, single, its_out)
            for its_w, its_v, its_out in blocks.pieces(w, v, out, step)
        ]
    if _has_rows(before.T) and _has_rows(after.T):
        step = max(_PANEL, _task_units(units, features))
        return [partial(_columns, *piece) for piece in blocks.pieces(before, after, out, step)]
    return blocks.tasks(before, after, out, shared)


def _task_units(units: int, features: int) -> int:
    """Units of a task, so that all tasks of a weight are about as large."""
    return -(-units // max(1, units * features // _TASK))


def _columns(before: Tensor, after: Tensor, out: NDArray[np.float64]) -> None:
    single = before.dtype != torch.float64
    w, v = _whole_rows(before.T), _whole_rows(after.T)
    out[:3] = 0.0
    for start in range(0, before.shape[0], _PANEL):
        # no further than the weight: the arrays may be wider
        units = slice(start, min(start + _PANEL, before.shape[0]))
        part = out[:, units]
        panel = np.empty((3, part.shape[1]), np.float32 if single else np.float64)
        sum_columns(w[:, units], v[:, units], panel, part)
    with np.errstate(all="ignore"):
        again = fill_tangential(out, single)
    if len(again):
        blocks.sum_exactly(before, after, again, out)


def _has_rows(weight: Tensor) -> bool:
    """Whether each row is contiguous and the next one lies after it."""
    rows, columns = weight.shape
    return (columns == 1 or weight.stride(1) == 1) and (rows == 1 or weight.stride(0) >= columns)


def _whole_rows(weight: Tensor) -> NDArray[Any]:
    """The stored bits as a C-contiguous array, as wide as the rows are apart in memory.

    numba compiles one fast loop for C-contiguous arrays. The columns beyond the weight's own may
    lie outside its memory and are never read.
    """
    rows, columns = weight.shape
    array: NDArray[Any] = weight.view(_STORAGE[weight.dtype]).numpy()
    width = columns if rows == 1 else weight.stride(0)
    return np.lib.stride_tricks.as_strided(
        array, (rows, width), (width * array.itemsize, array.itemsize)
    )
