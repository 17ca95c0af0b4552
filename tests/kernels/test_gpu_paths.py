from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dora_dynamics._kernels import LowRankUpdate, dense_sums_of_all, low_rank, low_rank_sums_of_all
from dora_dynamics.decomposition import reduce_units, unit_change
from tests.kernels.cases import DTYPES, LAYOUTS, assert_sums, changed, difficult

CANNOT_INTERPRET = 77
"""What `interpreted` ends with where Triton itself fails at adding two numbers."""

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests below run the real kernels")
def test_interpreted() -> None:
    """The kernels' arithmetic and the counts of launches and transfers, without a GPU."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, check=False, cwd=root, env=environment)
    if done.returncode == CANNOT_INTERPRET:
        pytest.skip("this Triton does not interpret with this numpy")
    assert done.returncode == 0


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_on_a_gpu(dtype: torch.dtype) -> None:
    layouts = [name for name in LAYOUTS if name != "unaligned"]
    pairs = [
        (LAYOUTS[layout](before.cuda()), LAYOUTS[layout](after.cuda()))
        for layout in layouts
        for before, after in [
            changed((700, 5000), dtype),
            changed((1, 17), dtype),
            difficult(dtype),
        ]
    ]
    for (before, after), found in zip(pairs, dense_sums_of_all(pairs), strict=True):
        assert_sums(found, before.cpu(), after.cpu())


@on_gpu
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("rank", [1, 16, 20, 50, 100, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_on_a_gpu(dtype: torch.dtype, rank: int, layout: str) -> None:
    w = changed((700, 1000), dtype)[0]
    A, B = torch.randn(rank, 1000) / 30, torch.randn(700, rank) * 1e-3
    update = LowRankUpdate(LAYOUTS[layout](w.cuda()), A.cuda(), B.cuda(), 2.0)
    found = low_rank_sums_of_all([update])[0]
    reference = low_rank.plain_sums(LowRankUpdate(w, A, B, 2.0))
    one, other = (reduce_units(unit_change(sums), "output") for sums in (found, reference))
    assert one.delta_magnitude == pytest.approx(other.delta_magnitude, rel=1e-6)
    assert one.delta_direction == pytest.approx(other.delta_direction, rel=1e-6)
