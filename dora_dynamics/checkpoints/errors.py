"""What goes wrong with files on disk, in one sentence that says what to do."""

from __future__ import annotations

from dora_dynamics.errors import InputError


class CheckpointError(InputError):
    """A checkpoint cannot be read or compared; the message is one sentence with the way out."""


def first_line(error: BaseException) -> str:
    """The first sentence of a library's error, fit to stand inside one of ours."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text[:300].rstrip(".: ")
