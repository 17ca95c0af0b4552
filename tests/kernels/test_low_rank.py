from __future__ import annotations

import pytest
import torch

from dora_dynamics._kernels import LowRankUpdate, low_rank
from tests.kernels.cases import DTYPES, LAYOUTS, changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 9), (33, 300), (700, 40)], ids=str)
def test_float32_path_against_float64(
    dtype: torch.dtype, layout: str, shape: tuple[int, int]
) -> None:
    w = LAYOUTS[layout](changed(shape, dtype)[0])
    A, B = torch.randn(4, shape[1]) / 8, torch.randn(shape[0], 4) * 1e-3
    update = LowRankUpdate(w, A, B, 0.5)
    found, reference = low_rank.cpu_sums(update), low_rank.plain_sums(update)
    scale = (reference.before_square * reference.update_square).sqrt()
    assert bool(((found.dot - reference.dot).abs() <= 1e-6 * scale).all())
    for name in ("before_square", "update_square", "tangential_square"):
        one, other = getattr(found, name), getattr(reference, name)
        assert bool(((one - other).abs() <= 2e-6 * other).all()), name


def test_an_update_along_the_weights_is_summed_in_float64() -> None:
    w = changed((6, 50), torch.float32)[0]
    A, B = w.clone(), 0.01 * torch.eye(6)
    found = low_rank.cpu_sums(LowRankUpdate(w, A, B, 1.0))
    assert torch.equal(found.dot, low_rank.plain_sums(LowRankUpdate(w, A, B, 1.0)).dot)
