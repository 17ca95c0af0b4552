"""Weights that kernels must get right, and what right is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dora_dynamics._kernels.sums import UnitSums, exact_tensors

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (1, 17), (9, 1), (5, 384), (33, 300), (3, 5000), (700, 3))


def changed(
    shape: tuple[int, int], dtype: torch.dtype, relative: float = 1e-2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A random weight and the same after a random change of this relative size."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02).to(dtype)
    change = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02 * relative
    return w, (w.to(torch.float64) + change).to(dtype)


def difficult(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One kind of trouble per row: see the comments."""
    w, v = changed((12, 96), dtype)
    w, v = w.clone(), v.clone()
    v[0] = w[0]  # nothing changed
    v[1] = (w[1].double() * 1.01).to(dtype)  # almost purely radial
    w[2] = 0  # zero before
    v[3] = 0  # zero after
    w[4] = v[4] = 0  # zero throughout
    v[5, 7] = float("nan")
    v[6, 8] = float("inf")
    w[7, 9] = float("-inf")
    if dtype != torch.float16:  # squares beyond float32's range, small and large
        w[8], v[8] = w[8] * 1e-22, v[8] * 1e-22
        w[9], v[9] = w[9] * 1e22, v[9] * 1e22
    v[10] = -w[10]  # turned around
    v[11] = w[11]
    v[11, 0] += 1  # one entry alone
    return w, v


def unaligned(weight: Tensor) -> Tensor:
    """The same values at an address no multiple of the element size, as in a mapped file."""
    size = weight.element_size()
    raw = bytearray(weight.numel() * size + 1)
    raw[1:] = weight.contiguous().view(torch.uint8).numpy().tobytes()
    found: Tensor = torch.frombuffer(raw, dtype=weight.dtype, offset=1).view(weight.shape)
    return found


LAYOUTS = {
    "rows": lambda w: w.contiguous(),
    "columns": lambda w: w.T.contiguous().T,
    "wider rows": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "wider columns": lambda w: torch.cat([w, w], 0).T.contiguous().T[: w.shape[0]],
    "later columns": lambda w: torch.cat([w, w], 0).T.contiguous().T[w.shape[0] :],
    "every other": lambda w: w.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "unaligned": unaligned,
}


def assert_sums(found: UnitSums, before: Tensor, after: Tensor, relative: float = 1e-6) -> None:
    """Each sum within `relative` of float64: e in units of √(ac); P above the noise of c."""
    reference = exact_tensors(before, after)
    a, c = reference.before_square, reference.update_square
    scales = {
        "before_square": a,
        "dot": (a * c).sqrt(),
        "update_square": c,
        "tangential_square": reference.tangential_square.clamp_min(1e-14 * c),
    }
    for name, scale in scales.items():
        one, other = getattr(found, name), getattr(reference, name)
        finite = other.isfinite()
        assert torch.equal(finite, one.isfinite()), name
        assert bool(((one - other).abs() <= relative * scale)[finite].all()), name
