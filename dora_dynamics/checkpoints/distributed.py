"""Torch distributed checkpoints (DCP), as FSDP writes them: `.metadata` and `.distcp` shards.

The metadata is a plain pickle, which torch itself would open unguarded; here only inert records
are made of it. A shard file is a row of small `torch.save` archives, whose values are stored
uncompressed and are mapped where they lie.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
import torch

from dora_dynamics.checkpoints.errors import CheckpointError, first_line, regular
from dora_dynamics.checkpoints.restricted_pickle import Record, RestrictedUnpickler, StorageKind
from dora_dynamics.checkpoints.safetensors_file import map_tensor
from dora_dynamics.checkpoints.stored import Contents, StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

METADATA: Final = ".metadata"
_METADATA_LIMIT: Final = 1 << 30
"""Bytes of the largest metadata that is read: those of 400 billion weights on 1,000 devices fit."""
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor: where it belongs and the bytes of the file it is saved in."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


def read_distributed(folder: Path) -> Contents:
    """The tensors of a distributed checkpoint, without a process group.

    Raises:
        CheckpointError: the metadata is damaged or unsafe, or a shard is missing.
    """
    metadata = _read_metadata(folder / METADATA)
    described, places = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(described, dict) or not isinstance(places, dict):
        raise _malformed(folder, "its metadata lists no tensors")
    found: dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]] = {}
    for index, place in places.items():
        name, offset = _index(index)
        if name is not None:
            found[name, offset] = _place(folder, place)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in described.items():
        if isinstance(name, str) and isinstance(entry, Record) and entry.get("size") is not None:
            tensors[name] = _tensor(folder, name, entry, found)
    if not tensors:
        raise _malformed(folder, "its metadata lists no tensors")
    return Contents(folder, "weights", tensors)


def _read_metadata(path: Path) -> Record:
    try:
        with regular(path, _METADATA_LIMIT).open("rb") as file:
            content = RestrictedUnpickler(file).load()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} is not the metadata of a distributed checkpoint ({first_line(error)}): copy "
            "or save it again."
        ) from error
    if not isinstance(content, Record):
        raise _malformed(path.parent, "its metadata is of another kind")
    return content


def _index(index: object) -> tuple[str | None, tuple[int, ...]]:
    if not isinstance(index, Record):
        return None, ()
    name, offset = index.get("fqn"), index.get("offset")
    return (name if isinstance(name, str) else None), _sizes(offset) or ()


def _place(folder: Path, place: object) -> tuple[Path, int, int]:
    file, start, length = (
        (place.get("relative_path"), place.get("offset"), place.get("length"))
        if isinstance(place, Record)
        else (None, None, None)
    )
    if not isinstance(file, str) or type(start) is not int or type(length) is not int:
        raise _malformed(folder, "its metadata does not say where a tensor is")
    assert isinstance(place, Record)
    if place.get("transform_descriptors"):
        raise CheckpointError(
            f"{folder} was saved with compression or another transform: save it without."
        )
    parts = PurePosixPath(file).parts
    if not parts or ".." in parts or "\\" in file or "\0" in file or file.startswith("/"):
        raise CheckpointError(
            f"{folder} names the shard {file[:80]!r}, which is outside its folder; such a "
            "checkpoint is not followed."
        )
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{folder} names the shard {file!r}, which is not there: copy it.")
    if start < 0 or length < 0 or start + length > path.stat().st_size:
        raise CheckpointError(f"{path} was cut short: copy or save it again.")
    return path, start, length


def _tensor(
    folder: Path,
    name: str,
    entry: Record,
    found: dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]],
) -> StoredTensor:
    shape, chunks = _sizes(entry.get("size")), entry.get("chunks")
    properties = entry.get("properties")
    state = properties.state if isinstance(properties, Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):
        dtype = state.get("dtype")
    if shape is None or not isinstance(chunks, list) or not isinstance(dtype, torch.dtype):
        raise _malformed(folder, f"its metadata does not describe {name!r}")
    pieces = []
    for chunk in chunks:
        offsets = _sizes(chunk.get("offsets")) if isinstance(chunk, Record) else None
        sizes = _sizes(chunk.get("sizes")) if isinstance(chunk, Record) else None
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
            raise _malformed(folder, f"its metadata does not describe the chunks of {name!r}")
        if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise _malformed(folder, f"a chunk of {name!r} reaches beyond it")
        place = found.get((name, offsets)) or (found.get((name, ())) if len(chunks) == 1 else None)
        if place is None:
            raise _malformed(folder, f"its metadata does not say where {name!r} is")
        pieces.append(_Chunk(offsets, sizes, *place))
    covered = sum(_count(piece.sizes) for piece in pieces)
    if covered != _count(shape) or _overlap(pieces):
        raise _malformed(folder, f"the chunks of {name!r} do not make up the whole of it")
    blocks: tuple[tuple[int, Callable[[], Tensor]], ...] = ()
    whole_rows = [piece for piece in pieces if piece.sizes[1:] == shape[1:] and piece.sizes[:1]]
    if len(whole_rows) == len(pieces) > 1:
        whole_rows.sort(key=lambda piece: piece.offsets)
        blocks = tuple(
            (piece.offsets[0], partial(_load_chunk, piece, dtype))
            for piece in whole_rows
            if _count(piece.sizes)
        )
    return StoredTensor(shape, dtype, lambda: _assemble(shape, dtype, pieces), folder, blocks)


def _overlap(pieces: list[_Chunk]) -> bool:
    """Whether two pieces hold the same element of their tensor."""
    filled = [piece for piece in pieces if _count(piece.sizes)]
    begins = np.array([piece.offsets for piece in filled], dtype=np.int64)
    ends = begins + np.array([piece.sizes for piece in filled], dtype=np.int64)
    return any(
        bool(((begins[n + 1 :] < ends[n]) & (ends[n + 1 :] > begins[n])).all(1).any())
        for n in range(len(filled) - 1)
    )


def _assemble(shape: tuple[int, ...], dtype: torch.dtype, pieces: list[_Chunk]) -> Tensor:
    if len(pieces) == 1 and pieces[0].sizes == shape:
        return _load_chunk(pieces[0], dtype)
    whole = torch.empty(shape, dtype=dtype)
    for piece in pieces:
        if _count(piece.sizes):
            window = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))
            whole[window] = _load_chunk(piece, dtype)
    return whole


def _load_chunk(chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    """The tensor of one small archive, mapped from where its values lie in the shard."""
    try:
        with chunk.file.open("rb") as file:
            window = _Window(file, chunk.start, chunk.length)
            with zipfile.ZipFile(window) as archive:
                tensor = _map_archive(archive, window, chunk)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(
            f"{chunk.file} is damaged ({first_line(error)}): copy or save it again."
        ) from error
    if tuple(tensor.shape) != chunk.sizes or tensor.dtype != dtype:
        raise CheckpointError(f"{chunk.file} does not hold what its metadata says: copy it again.")
    return tensor


def _map_archive(archive: zipfile.ZipFile, window: _Window, chunk: _Chunk) -> Tensor:
    names = {name.split("/", 1)[-1]: name for name in archive.namelist()}

    def storage(identifier: Any) -> tuple[torch.dtype, int, int]:
        _, kind, key, _, count = identifier
        info = archive.getinfo(names[f"data/{key}"])
        if info.compress_type != zipfile.ZIP_STORED or not isinstance(kind, StorageKind):
            raise ValueError("its values are compressed")
        if count * kind.dtype.itemsize > info.file_size:
            raise ValueError("its storage is cut short")
        window.seek(info.header_offset)
        _, name_length, extra_length = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
        begin = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        return kind.dtype, chunk.start + begin, count

    def rebuild(
        stored: tuple[torch.dtype, int, int], offset: int, size: Any, stride: Any, *_: object
    ) -> Tensor:
        dtype, begin, count = stored
        reach = offset + sum((s - 1) * t for s, t in zip(size, stride, strict=True)) + 1
        if _count(size) and not (offset >= 0 and reach <= count and _count(size) <= count):
            raise ValueError("a tensor reaches beyond its storage")
        flat = map_tensor(chunk.file, begin, dtype, (count,))
        return flat.as_strided(tuple(size), tuple(stride), offset)

    content = archive.read(names["data.pkl"])
    tensor = RestrictedUnpickler(io.BytesIO(content), rebuild=rebuild, storage=storage).load()
    if not isinstance(tensor, torch.Tensor):
        raise TypeError("it holds no tensor")
    return tensor


class _Window(io.RawIOBase):
    """A part of a file that can be read as if it were a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        content = self._file.read(size)
        self._at += len(content)
        return content


def _sizes(value: object) -> tuple[int, ...] | None:
    if isinstance(value, tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        return value
    return None


def _count(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def _malformed(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not a whole distributed checkpoint: {reason}; copy or save it again."
    )
