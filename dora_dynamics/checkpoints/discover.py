"""Which checkpoints a path, a glob, a parent folder or a hub name stands for."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Final

from dora_dynamics.checkpoints.errors import CheckpointError, first_line
from dora_dynamics.checkpoints.folder import TORCH_SUFFIXES
from dora_dynamics.checkpoints.opening import is_checkpoint, step_in_name

_HUB_NAME: Final = re.compile(r"(?:[\w.-]+/)?\w[\w.-]*(?:@[\w./-]+)?")
_SUFFIXES: Final = (".safetensors", *TORCH_SUFFIXES)
_COPIES: Final = ["consolidated*", "original/*", "onnx/*", "openvino/*"]
"""The same weights once more, in the form of other programs."""
_LOOK_ALIKES: Final = frozenset(
    {"optimizer.pt", "scheduler.pt", "training_args.bin", "scaler.pt", "optimizer.bin"}
)


def locate(path: str | os.PathLike[str]) -> Path:
    """A path on this machine; a hub name ("gpt2", "org/model", "org/model@main") is fetched.

    Raises:
        CheckpointError: neither is there.
    """
    local = Path(path).expanduser()
    try:
        if local.exists():
            return local
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)[:200]!r} is not a usable path.") from error
    if _HUB_NAME.fullmatch(str(path)) and local.suffix not in (*_SUFFIXES, ".json"):
        return _fetch(str(path))
    raise CheckpointError(f"{path} does not exist.")


def expand(paths: list[str | os.PathLike[str]]) -> list[Path]:
    """Every checkpoint that the paths stand for; each glob and parent folder in step order.

    Raises:
        CheckpointError: a path stands for none, or one checkpoint is named twice.
    """
    found: list[Path] = []
    for path in paths:
        text = os.fspath(path)
        if glob.has_magic(text) and not Path(text).exists():
            matches = [Path(match) for match in glob.glob(text, recursive=True)]  # noqa: PTH207
            matches = [match for match in matches if match.is_dir() or match.suffix in _SUFFIXES]
            if not matches:
                raise CheckpointError(f"no checkpoint matches {text}.")
            found += _in_step_order(matches)
        else:
            found += _children(locate(path))
    twice = next((path for path in found if found.count(path) > 1), None)
    if twice is not None:
        raise CheckpointError(f"{twice} is named twice: name each checkpoint once.")
    return found


def _children(path: Path) -> list[Path]:
    """The checkpoints inside a folder, or the path itself where it is one."""
    if not path.is_dir():
        return [path]
    try:
        entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    numbered = [
        entry
        for entry in entries
        if entry.is_dir() and step_in_name(entry) is not None and _holds_weights(entry)
    ]
    if numbered:
        return _in_step_order(numbered)
    if is_checkpoint(path):
        return [path]
    folders = [entry for entry in entries if entry.is_dir() and is_checkpoint(entry)]
    if folders:
        return _in_step_order(folders)
    files = [
        entry for entry in entries if entry.suffix in _SUFFIXES and entry.name not in _LOOK_ALIKES
    ]
    numbered = [file for file in files if step_in_name(file) is not None]
    if len(numbered) == len(files) > 1 or (numbered and any(f.suffix == ".ckpt" for f in files)):
        return _in_step_order(numbered)  # beside Lightning's, a last.ckpt is a copy
    if len(files) == 1:
        return files
    return [path]


def _holds_weights(folder: Path) -> bool:
    if is_checkpoint(folder):
        return True
    return any(folder.glob("*.safetensors")) or any(folder.glob("*_states.pt"))


def _in_step_order(paths: list[Path]) -> list[Path]:
    def key(path: Path) -> tuple[int, str]:
        step = step_in_name(path)
        return (-1 if step is None else step, str(path))

    return sorted(paths, key=key)


def hub_name(path: Path) -> str:
    """The hub name of a snapshot in the hub's cache; the last part of any other path."""
    folder = path.parent.parent.name if path.parent.name == "snapshots" else ""
    return folder.removeprefix("models--").replace("--", "/") or path.name


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name} does not exist here; to fetch it from the hub: pip install huggingface_hub."
        ) from error
    repository, _, revision = name.partition("@")
    patterns = ["*.json", "*.safetensors"]
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=_COPIES,
            )
        )
        if not any(folder.rglob("*.safetensors")):
            snapshot_download(
                repository, revision=revision or None, allow_patterns=["*.json", "*.bin"]
            )
    except Exception as error:  # the client raises many kinds, offline or refused
        raise CheckpointError(
            f"{name} is neither a path on this machine nor a model the hub gave "
            f"({first_line(error)})."
        ) from error
    return folder
