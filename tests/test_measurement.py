"""Many sites measured at once, parts and heads of one matrix among them, against float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dora_dynamics._kernels import blocks, dispatch
from dora_dynamics.effective import Dense, LowRank
from dora_dynamics.measurement import measure_all
from dora_dynamics.sites import Site

if TYPE_CHECKING:
    from dora_dynamics.decomposition import Axis, WeightChange

WIDTH, HEAD = 37, 5  # 3 heads of 5: query, key and value fill 45 rows
PARTS = {"query": ((0, 15),), "value": ((30, 45),), "split": ((1, 4), (17, 18), (40, 45))}


@pytest.fixture(params=["blocks", "numba_path"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures by one of the CPU paths, whichever is installed."""
    path: Any = blocks
    if request.param == "numba_path":
        pytest.importorskip("numba")
        from dora_dynamics._kernels import numba_path as path
    monkeypatch.setattr(dispatch, "cpu_path", lambda: path)


def sites(stored_transposed: bool) -> list[Site]:
    """Parts of a fused weight, then its last two value heads, then all of another one."""
    parts = [
        Site(f"c_attn[{role}]", 0, "", role, stored_transposed, module="c_attn", rows=rows)
        for role, rows in PARTS.items()
    ]
    heads = [
        Site(
            *("h.1.c_attn[value]", 1, "", "value", stored_transposed),
            module="h.1.c_attn", rows=((30 + HEAD * i, 30 + HEAD * (i + 1)),), head=i,
        )
        for i in (1, 2)
    ]  # fmt: skip
    return [*parts, *heads, Site("c_fc", 0, "", "up", stored_transposed)]


def by_definition(w: np.ndarray, v: np.ndarray, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Per unit m' − m_0 and, by the chord of unit vectors, 1 − cos."""
    along = 1 if axis == "output" else 0
    m_0, m = (np.linalg.norm(x, axis=along, keepdims=True) for x in (w, v))
    chord = np.linalg.norm(v / m - w / m_0, axis=along)
    return (m - m_0).ravel(), chord**2 / 2


def assert_measured(found: WeightChange, w: np.ndarray, v: np.ndarray, axis: Axis) -> None:
    difference, turned = by_definition(w, v, axis)
    noise = 1e-7 * float(np.linalg.norm(v - w))
    np.testing.assert_allclose(found.units.magnitude_difference, difference, rtol=1e-6, atol=noise)
    np.testing.assert_allclose(found.units.one_minus_cosine, turned, rtol=1e-6)
    assert found.delta_magnitude == pytest.approx(np.abs(difference).mean(), rel=1e-6)
    assert found.delta_direction == pytest.approx(turned.mean(), rel=1e-6)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("stored_transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parts_and_heads_are_measured_as_their_own_rows(
    dtype: torch.dtype, stored_transposed: bool, axis: Axis
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, expected = [], []
    stored: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for site in sites(stored_transposed):
        if site.tensor not in stored:
            shape = (WIDTH, 45) if stored_transposed else (45, WIDTH)
            drawn, update = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
            w_0 = drawn.to(dtype)
            stored[site.tensor] = w_0, (w_0.double() + 0.05 * update).to(dtype)
        before, after = stored[site.tensor]
        weights.append((site, before, Dense(after)))
        expected.append([site.oriented(x).double().numpy() for x in (before, after)])
    for found, (w, v) in zip(measure_all(weights, axis), expected, strict=True):
        assert_measured(found, w, v, axis)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("stored_transposed", [False, True], ids=["Linear", "Conv1D"])
def test_parts_of_low_rank_weights(stored_transposed: bool, dora: bool, axis: Axis) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights, expected = [], []
    stored: dict[str, tuple[torch.Tensor, LowRank]] = {}
    for site in sites(stored_transposed):
        if site.tensor not in stored:
            w_0 = normal(WIDTH, 45) if stored_transposed else normal(45, WIDTH)
            m = 6 + normal(45).abs() if dora else None
            stored[site.tensor] = w_0, LowRank(0.1 * normal(3, WIDTH), normal(45, 3), 0.5, m)
        before, effective = stored[site.tensor]
        weights.append((site, before, effective))
        base = (before.T if stored_transposed else before).double()
        after = base + effective.scaling * effective.B.double() @ effective.A.double()
        if effective.magnitude is not None:
            after *= effective.magnitude.double()[:, None] / after.norm(dim=1, keepdim=True)
        expected.append([site.select(x).numpy() for x in (base, after)])
    for found, (w, v) in zip(measure_all(weights, axis), expected, strict=True):
        assert_measured(found, w, v, axis)
