"""What the page's script does with packed arrays, once more in numpy."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def unpack(packed: dict[str, Any]) -> NDArray[Any]:
    planes = np.frombuffer(zlib.decompress(base64.b64decode(packed["deflated"])), np.uint8)
    size = np.dtype(packed["type"]).itemsize
    return planes.reshape(size, packed["length"]).T.copy().view(f"<{packed['type'][0]}{size}")[:, 0]
