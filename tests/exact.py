"""Random weights, and differences from them in numpy's extended precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCED = [
    "delta_magnitude",
    "delta_direction",
    "signed_delta_magnitude",
    "relative_delta_magnitude",
    "magnitude_before",
    "update_norm",
]


Extended = Any  # np.ndarray of np.longdouble, which numpy's stubs cannot tell from float64


def extended(weight: torch.Tensor) -> Extended:
    return weight.detach().cpu().double().numpy().astype(np.longdouble)


def relative_error(value: float, expected: Extended) -> float:
    return float(abs((np.longdouble(value) - expected) / expected))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
