"""Arithmetic as it is written, whatever a training loop has allowed for its own speed.

A loop may let products of float32 matrices be taken in TF32 or bfloat16, for all threads
(`torch.set_float32_matmul_precision`) or inside `torch.autocast`. What is read and measured
meanwhile would be rounded to three digits, and a layer that is linear would not look it.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FULL: Final = ("none", "ieee")


@contextmanager
def full_precision(devices: Iterable[str]) -> Iterator[None]:
    """No autocast on devices of these types, and matrix products in the precision of their type.

    What was set is set again afterwards, by torch's older and by its newer way to set it.
    """
    before = _overall_precision()
    by_backend = {backend: backend.fp32_precision for backend in _matmul_backends()}
    reduced = before != "highest" or any(kind not in _FULL for kind in by_backend.values())
    with ExitStack() as stack:
        for device in set(devices):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if not reduced:
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before or "highest")
            for backend, kind in by_backend.items():
                if backend.fp32_precision != kind:
                    backend.fp32_precision = kind


def _overall_precision() -> str | None:
    """What `torch.set_float32_matmul_precision` set; None where only the newer way was used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to sum up what was set backend by backend
        return None


def _matmul_backends() -> list[Any]:
    """Where the precision is set backend by backend; nowhere before torch 2.9."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in backends if _has_precision(backend)]


def _has_precision(backend: Any) -> bool:
    try:
        return isinstance(backend.fp32_precision, str)
    except AttributeError:
        return False
