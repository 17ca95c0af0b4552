"""Opening the files of a run directory, which may come from a stranger.

A run directory is data: nothing in it is executed or unpickled, no link in it leads out of it, and
no file is read that is no regular file (a pipe would be waited for, a device never ends) or that
is larger than what it can be. What was written by hand or by an attacker is refused in one
sentence before it costs memory or time.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, BinaryIO, Final

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

INFO_LIMIT: Final = 1 << 26
"""Bytes of the largest `run.json` that is read."""
TABLE_LIMIT: Final = 1 << 32
"""Bytes of the largest `trajectory.csv` that is read: some ten million rows."""

_OPEN: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class RunDirectoryError(InputError):
    """A run directory cannot be read or must not be written; the message says what to do."""


def checked_path(path: Path, directory: Path) -> Path:
    """`path`, which is below `directory`, if no link leads it out of there.

    Raises:
        RunDirectoryError: one does.
    """
    try:
        inside = path.resolve().is_relative_to(directory.resolve())
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL in a name
        inside = False
    if not inside:
        raise RunDirectoryError(
            f"{path} is a link out of its run directory, which is not followed: put the file "
            "itself there."
        )
    return path


def opened(directory: Path, name: str, limit: int) -> BinaryIO:
    """A regular file of a run directory, opened for reading.

    Args:
        directory: the run directory.
        name: of the file in it.
        limit: bytes it may have.

    Raises:
        FileNotFoundError: there is none.
        OSError: the system refuses to open it.
        RunDirectoryError: it is no file, leads out of the directory, or is too large.
    """
    path = checked_path(directory / name, directory)
    descriptor = os.open(path, _OPEN)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode) or not stat.S_ISREG(status.st_mode):
            raise RunDirectoryError(f"{path} cannot be read: it is no regular file.")
        if status.st_size > limit:
            raise RunDirectoryError(
                f"{path} has {_readable(status.st_size)}, more than the {_readable(limit)} that "
                "such a file can have."
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _readable(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"
