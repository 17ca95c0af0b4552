"""Where a result comes from: versions of what computed it and the kind of machine it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from typing import Final

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
    """The kind of machine in a few words, such as "x86_64, 2 cores, no GPU"; never its name."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {os.cpu_count()} cores, {accelerator}"


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
