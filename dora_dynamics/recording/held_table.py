"""The table of a run that is being recorded, held open: nothing that was written to it is lost."""

from __future__ import annotations

import io
import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

from dora_dynamics.runs.trajectory_csv import TRAJECTORY_FILE

if TYPE_CHECKING:
    from pathlib import Path

_FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class HeldTable:
    """A `trajectory.csv`, by the file itself and not by its name.

    So it can be read back also when its folder was removed, and is told from one that another run
    has put in its place.
    """

    def __init__(self, directory: Path) -> None:
        """Open the table of a run directory.

        Raises:
            OSError: it cannot be opened for writing.
        """
        self._path = directory / TRAJECTORY_FILE
        self._descriptor = os.open(self._path, _FLAGS | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size

    def is_in_place(self) -> bool:
        """Whether the name still leads to this file."""
        try:
            return os.path.samestat(self._path.lstat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def append(self, content: bytes) -> None:
        """Add bytes behind the last, all of them or none; they are on disk when it returns.

        Raises:
            OSError: the disk takes no more.
        """
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(self._descriptor, content[written:], self._size + written)
            os.fsync(self._descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(content)

    def stream(self) -> BinaryIO:
        """All that was added, from the beginning."""
        return io.BufferedReader(_Span(self, self._descriptor, self._size), 1 << 16)


class _Span(io.RawIOBase):
    """The first bytes of a file, read without moving in it."""

    def __init__(self, table: HeldTable, descriptor: int, size: int) -> None:
        self._table = table  # it closes the descriptor when it goes
        self._descriptor, self._size, self._at = descriptor, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self._size - self._at)
        content = os.pread(self._descriptor, wanted, self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
