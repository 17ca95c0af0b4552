"""Where a result comes from: versions of what computed it and the kind of machine it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

_PACKAGES: Final = (
    "dora-dynamics",
    "torch",
    "numpy",
    "pandas",
    "scipy",
    "matplotlib",
    "safetensors",
    "transformers",
    "peft",
)
_DRIVER: Final = Path("/proc/driver/nvidia/gpus")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that take part in a measurement."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The kind of machine in a few words, such as "x86_64, 2 cores, no GPU"; never its name.

    CUDA that nothing has initialised stays so: children that the process forks can use it still.
    """
    return f"{platform.machine()}, {os.cpu_count()} cores, {_gpu()}"


def _gpu() -> str:
    """The GPU in use or, where CUDA is not initialised here, the kinds that the driver lists."""
    import torch

    cuda: Any = torch.cuda
    if cuda.is_initialized():
        return str(cuda.get_device_name())
    with warnings.catch_warnings():  # a driver that does not answer is no matter of the caller's
        warnings.simplefilter("ignore")
        if not cuda.device_count():
            return "no GPU"
    told = [file.read_text(errors="replace") for file in _DRIVER.glob("*/information")]
    kinds = {found[1] for text in told if (found := re.search(r"^Model:\s*(.+?)\s*$", text, re.M))}
    return " or ".join(sorted(kinds)) or "a GPU"


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
