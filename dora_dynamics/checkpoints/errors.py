"""What goes wrong with files on disk, in one sentence that says what to do."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


class CheckpointError(InputError):
    """A checkpoint cannot be read or compared; the message is one sentence with the way out."""


def regular(path: Path, limit: int | None = None) -> Path:
    """`path`, if it is a file that ends: a pipe would be waited for, a device never ends.

    Args:
        path: of the file.
        limit: bytes it may have.

    Raises:
        CheckpointError: it is something else, or larger.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} cannot be read: it is no regular file.")
    if limit is not None and status.st_size > limit:
        raise CheckpointError(f"{path} is too large to be what its name says.")
    return path


def first_line(error: BaseException) -> str:
    """The first sentence of a library's error, fit to stand inside one of ours."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text[:300].rstrip(".: ")
