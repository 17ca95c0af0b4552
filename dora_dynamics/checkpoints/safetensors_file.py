"""Safetensors files: a strict reading of the header, and tensors mapped from the file.

Each tensor is mapped on its own when it is loaded, so that only the bytes of the chosen tensors
are ever touched, and their pages go when the tensor does.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, Final

import torch

from dora_dynamics import strict_json
from dora_dynamics.checkpoints.errors import CheckpointError, regular
from dora_dynamics.checkpoints.stored import StoredTensor

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_HEADER_LIMIT: Final = 100_000_000

_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.uint8,  # a scale of other tensors, of no use alone
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file and its text metadata, from the header alone.

    Raises:
        CheckpointError: the file is truncated or its header does not describe its bytes.
    """
    header, start, size = _header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(path, "its metadata is not text")
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        tensor, span = _entry(path, name, entry, start)
        tensors[name] = tensor
        spans.append(span)
    _check_spans(path, spans, size - start)
    return tensors, metadata


def map_tensor(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor over bytes of a file, mapped copy-on-write and never read before it is used.

    Raises:
        CheckpointError: the file is gone or shorter than it was.
    """
    count = 1
    for length in shape:
        count *= length
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - begin + count * dtype.itemsize
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can no longer be read: {error}.") from error
    flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=offset - begin)
    if (offset - begin) % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(shape)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        size = regular(path).stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise _malformed(path, "it is shorter than its header says")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        header = strict_json.parsed(text)
    except strict_json.DuplicateKeyError as error:
        raise _malformed(path, f"two tensors are named {error}") from error
    except ValueError as error:
        raise _malformed(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed(path, "its header is not a JSON object")
    return header, 8 + length, size


def _entry(
    path: Path, name: str, entry: object, start: int
) -> tuple[StoredTensor, tuple[int, int]]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _malformed(path, f"its header does not describe {name!r}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise _malformed(path, f"{name!r} has the unknown dtype {str(entry['dtype'])[:40]!r}")
    dtype = _DTYPES[entry["dtype"]]
    shape, offsets = _sizes(entry["shape"]), _sizes(entry["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:
        raise _malformed(path, f"the shape or place of {name!r} is not a list of whole numbers")
    begin, end = offsets
    stored = StoredTensor(shape, dtype, lambda: map_tensor(path, start + begin, dtype, shape), path)
    if end - begin != stored.nbytes:
        raise _malformed(path, f"{name!r} takes {end - begin} bytes but needs {stored.nbytes}")
    return stored, (begin, end)


def _sizes(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, list) or len(values) > 16:
        return None
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        return None
    return tuple(values)


def _check_spans(path: Path, spans: list[tuple[int, int]], size: int) -> None:
    reached = 0
    for begin, end in sorted(spans):
        if begin < reached:
            raise _malformed(path, "two of its tensors overlap")
        if begin > reached:
            raise _malformed(path, "there are bytes between its tensors")
        if end > size:
            raise _malformed(
                path, f"it was cut short: its tensors need {end} bytes and it has {size}"
            )
        reached = end
    if reached != size:
        raise _malformed(path, f"its tensors take {reached} bytes and it has {size}")


def _malformed(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole safetensors file: {reason}; copy or save it again."
    )
