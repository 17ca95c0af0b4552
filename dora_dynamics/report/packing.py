"""Arrays in a page: compact, and read by the browser without a library (`page/unpack.js`)."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike


def floats(values: ArrayLike) -> dict[str, object]:
    """Numbers as float32, the precision in which the page shows them."""
    return _packed(values, np.float32)


def integers(values: ArrayLike) -> dict[str, object]:
    """Whole numbers as int32."""
    return _packed(values, np.int32)


def text(content: str) -> dict[str, object]:
    """Text in UTF-8, deflated, in base64."""
    return {"type": "text", "deflated": _in_base64(content.encode())}


def _packed(values: ArrayLike, dtype: DTypeLike) -> dict[str, object]:
    """The array's bytes, first all first bytes, then all second ones …, deflated, in base64.

    Bytes of equal rank resemble each other (signs and exponents most of all), so that they
    deflate better side by side.
    """
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).ravel()
    planes = array.view(np.uint8).reshape(-1, array.itemsize).T
    content = _in_base64(planes.tobytes())
    return {"type": np.dtype(dtype).name, "length": array.size, "deflated": content}


def _in_base64(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 6)).decode("ascii")
