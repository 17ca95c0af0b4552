"""A change by its factors equals the dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import dora_dynamics as dd
from tests.exact import DTYPES, REDUCED, extended, randn, relative_error

if TYPE_CHECKING:
    from dora_dynamics.decomposition import Axis


class TestLowRank:
    def factors(
        self, out: int, features: int, rank: int, relative: float, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight, A, B = randn(out, features), randn(rank, features, seed=1), randn(out, rank, seed=2)
        B *= relative * weight.norm() / (B @ A).norm() / 0.37
        return weight.to(device), A.to(device), B.to(device)

    @pytest.mark.parametrize("relative", [10.0, 1e-1, 1e-3, 1e-5, 1e-7])
    @pytest.mark.parametrize("axis", ["output", "input"])
    @pytest.mark.parametrize("shape", [(33, 20, 4), (5, 90, 1), (300, 1001, 7), (4, 3, 9)])
    def test_lora_equals_the_dense_change(
        self, relative: float, axis: Axis, shape: tuple[int, int, int], device: str
    ) -> None:
        weight, A, B = self.factors(*shape, relative, device)
        # In extended precision: in float64, W_0 + s·BA rounds away a part of the smallest changes.
        update = 0.37 * (extended(B) @ extended(A))
        w0 = extended(weight)
        if axis == "input":
            w0, update = w0.T, update.T
        w = w0 + update
        m0, m = np.sqrt((w0 * w0).sum(1)), np.sqrt((w * w).sum(1))
        chord = w / m[:, None] - w0 / m0[:, None]
        change = dd.low_rank_change(weight, A, B, scaling=0.37, axis=axis)
        np.testing.assert_allclose(
            change.units.one_minus_cosine,
            ((chord * chord).sum(1) / 2).astype(float),
            rtol=1e-7,
            atol=1e-14 * min(relative, 1) ** 2,
        )
        assert relative_error(change.delta_magnitude, np.abs(m - m0).mean()) <= 1e-7
        assert relative_error(change.update_norm, np.sqrt((update * update).sum())) <= 1e-9

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("axis", ["output", "input"])
    def test_dora_equals_the_dense_change(
        self, dtype: torch.dtype, axis: Axis, device: str
    ) -> None:
        weight, A, B = (t.to(dtype) for t in self.factors(17, 29, 3, 0.2, device))
        m = (weight.double().norm(dim=1) * torch.linspace(0.7, 1.4, 17).to(device)).to(dtype)
        m[3] *= -1
        turned = weight.double() + 1.5 * B.double() @ A.double()
        after = m.double()[:, None] * turned / turned.norm(dim=1, keepdim=True)
        expected = dd.weight_change(weight.double(), after, axis)
        change = dd.low_rank_change(weight, A, B, scaling=1.5, magnitude=m, axis=axis)
        # |m| − m_0 is a difference of two magnitudes: it is as good as m_0, which a GPU may sum
        # from fp32 terms. Elsewhere it is float64 throughout.
        rough = device != "cpu" and dtype != torch.float64
        for name in [*REDUCED, "radial_share"]:
            tolerance = 1e-6 if rough else 1e-10
            value = getattr(expected, name)
            assert getattr(change, name) == pytest.approx(value, rel=tolerance), name
        for name in ("one_minus_cosine", "magnitude_difference", "radial_update", "update_square"):
            np.testing.assert_allclose(
                getattr(change.units, name),
                getattr(expected.units, name),
                rtol=1e-6 if rough else 1e-9,
                atol=1e-6 if rough else 1e-13,
                err_msg=name,
            )

    def test_negative_magnitude_turns_its_unit_around(self) -> None:
        weight, A, B = self.factors(6, 11, 2, 0.1)
        m = weight.norm(dim=1)
        plain = dd.low_rank_change(weight, A, B, scaling=1.0, magnitude=m).units
        m[4] *= -1
        flipped = dd.low_rank_change(weight, A, B, scaling=1.0, magnitude=m).units
        assert flipped.one_minus_cosine[4] == pytest.approx(2 - plain.one_minus_cosine[4])
        assert flipped.one_minus_cosine[4] > 1.9
        np.testing.assert_array_equal(flipped.magnitude_after, plain.magnitude_after)
        np.testing.assert_array_equal(
            np.delete(flipped.one_minus_cosine, 4), np.delete(plain.one_minus_cosine, 4)
        )

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("where", ["A", "B", "m", "W"])
    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("axis", ["output", "input"])
    def test_non_finite_factors_are_reported(
        self, bad: float, where: str, dora: bool, axis: Axis
    ) -> None:
        weight, A, B = self.factors(6, 11, 2, 0.1)
        m = weight.norm(dim=1)
        if where == "m" and not dora:
            return
        {"A": A[0], "B": B[2], "m": m, "W": weight[1]}[where][1] = bad
        change = dd.low_rank_change(
            weight, A, B, scaling=1.0, magnitude=m if dora else None, axis=axis
        )
        assert change.non_finite > 0
        for name in REDUCED:
            assert np.isnan(getattr(change, name)), name

    @pytest.mark.parametrize("axis", ["output", "input"])
    def test_dora_on_a_zero_unit_leaves_it_zero(self, axis: Axis) -> None:
        weight, A, B = self.factors(6, 11, 2, 0.1)
        weight[2], B[2] = 0, 0
        change = dd.low_rank_change(
            weight, A, B, scaling=1.0, magnitude=weight.norm(dim=1), axis=axis
        )
        assert change.non_finite == 0
        assert change.zero_units == (1 if axis == "output" else 0)
        assert np.isfinite([getattr(change, name) for name in REDUCED]).all()

    def test_misfits_are_named(self) -> None:
        weight, A, B = self.factors(6, 11, 2, 0.1)
        with pytest.raises(
            ValueError, match=r"needs A of shape \(rank, 11\) and B of shape \(6, rank\), not"
        ):
            dd.low_rank_change(weight, A.T, B, scaling=1.0)
        with pytest.raises(ValueError, match=r"not \(2, 11\) and \(6, 1\)"):
            dd.low_rank_change(weight, A, B[:, :1], scaling=1.0)
        with pytest.raises(ValueError, match=r"magnitude must have shape \(6,\), not \(6, 1\)"):
            dd.low_rank_change(weight, A, B, scaling=1.0, magnitude=torch.ones(6, 1))
