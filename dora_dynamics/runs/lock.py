"""One process writes into a run directory at a time; a second is refused.

The lock is the operating system's own, on a file `.lock` in the directory. It ends with the process
that holds it, however that ends, so that none is ever stale; the file itself says nothing. Within
one process any number of recorders may hold it: which of them the directory belongs to is told by
its table (see `recording.held_table`).
"""

from __future__ import annotations

import errno
import os
import platform
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dora_dynamics.runs.files import RunDirectoryError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows goes without
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOCK_FILE: Final = ".lock"

_HELD_ELSEWHERE: Final = (errno.EACCES, errno.EAGAIN)


@dataclass
class _Held:
    descriptor: int
    holders: int


_guard = threading.Lock()
_held: dict[Path, _Held] = {}


def hold(directory: Path) -> Callable[[], None]:
    """Take the lock of a run directory, which exists.

    Where the file system has no locks, none is taken.

    Returns:
        What gives it back; a second call of it does nothing.

    Raises:
        RunDirectoryError: another process holds it.
        OSError: no file can be made there.
    """
    path = directory.resolve() / LOCK_FILE
    with _guard:
        if path in _held and not _is_in_place(path, _held[path].descriptor):
            os.close(_held.pop(path).descriptor)  # the directory was removed meanwhile
        if path not in _held:
            _held[path] = _Held(_locked(path), 0)
        held = _held[path]
        held.holders += 1
    given_back = False

    def give_back() -> None:
        nonlocal given_back
        with _guard:
            if given_back or _held.get(path) is not held:
                return
            given_back = True
            held.holders -= 1
            if held.holders == 0:
                del _held[path]
                if _is_in_place(path, held.descriptor):
                    path.unlink(missing_ok=True)
                os.close(held.descriptor)

    return give_back


def _locked(path: Path) -> int:
    """A descriptor of the file at `path`, locked."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            if HAS_LOCKS:
                _lock(descriptor, path)
            if _is_in_place(path, descriptor):  # not one that its holder has just removed
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
                return descriptor
        except OSError as error:  # a full disk, too, is no reason to go without the lock
            if _is_in_place(path, descriptor) and error.errno in (errno.ENOSPC, errno.EFBIG):
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD_ELSEWHERE:
            return  # a file system without locks
        said = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
        who = "".join(filter(str.isprintable, said))
        raise RunDirectoryError(
            f"{path.parent} is being written by another process ({who or 'which is starting'}): "
            "wait for its end, or choose another folder."
        ) from None


def _is_in_place(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _forget() -> None:
    """In a forked child, which holds no lock of its parent's."""
    global _guard
    _guard = threading.Lock()
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
