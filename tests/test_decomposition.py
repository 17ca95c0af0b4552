"""The decomposition against numpy in extended precision, known rotations and its own symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dora_dynamics as dd
from dora_dynamics.decomposition import reduce_units
from dora_dynamics.errors import InputError
from tests.exact import DTYPES, REDUCED, Extended, extended, randn, relative_error

SHAPES = [(1, 1), (1, 7), (7, 1), (13, 5), (3, 140_001), (300, 17)]


def reference(before: torch.Tensor, after: torch.Tensor) -> dict[str, Extended]:
    """ΔM and ΔD per row by another way: 1 − cos is half the squared chord of the unit vectors.

    In float64, |m' − m_0| of a change of 1e-6 would itself be right to some 1e-8 only; numpy's
    extended precision (80 bits on x86) has three digits more, so that a difference found is the
    difference of the code under test.
    """
    parts = []
    for start in range(0, len(before), 256):
        w0, w = extended(before[start : start + 256]), extended(after[start : start + 256])
        m0, m = np.sqrt((w0 * w0).sum(1)), np.sqrt((w * w).sum(1))
        chord = w / m[:, None] - w0 / m0[:, None]
        difference = w - w0
        parts.append((m0, m - m0, (chord * chord).sum(1) / 2, (difference * difference).sum(1)))
    m0, difference, one_minus_cosine, square = (np.concatenate(p) for p in zip(*parts, strict=True))
    return {
        "units.magnitude_before": m0,
        "units.magnitude_difference": difference,
        "units.one_minus_cosine": one_minus_cosine,
        "delta_magnitude": np.abs(difference).mean(),
        "delta_direction": one_minus_cosine.mean(),
        "signed_delta_magnitude": difference.mean(),
        "relative_delta_magnitude": (np.abs(difference) / m0).mean(),
        "magnitude_before": m0.mean(),
        "units.update_norm": np.sqrt(square),
        "update_norm": np.sqrt(square.sum()),
    }


def perturbed(weight: torch.Tensor, relative: float, seed: int = 1) -> torch.Tensor:
    """`weight` plus a random change of `relative` of each row's norm, before any rounding."""
    noise = randn(*weight.shape, seed=seed)
    noise *= relative * weight.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return weight + noise


@pytest.fixture(scope="module")
def large() -> torch.Tensor:
    return randn(4096, 1024) * 0.05


@pytest.mark.parametrize("relative", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_changes_of_large_weights(
    large: torch.Tensor, dtype: torch.dtype, relative: float, device: str
) -> None:
    before, after = large.to(dtype), perturbed(large, relative).to(dtype)
    expected = reference(before, after)
    assert expected["delta_direction"] > 0
    change = dd.weight_change(before.to(device), after.to(device))
    for name in REDUCED:
        if name == "signed_delta_magnitude":  # a mean that cancels: judged against what it sums
            error = abs(change.signed_delta_magnitude - float(expected[name]))
            assert error <= 1e-6 * float(expected["delta_magnitude"]), name
        else:
            assert relative_error(getattr(change, name), expected[name]) <= 1e-6, name


@pytest.mark.parametrize("radial", [0.01, -0.01])
def test_one_percent_radial_change_with_hardly_any_turning(
    large: torch.Tensor, radial: float, device: str
) -> None:
    noise = randn(*large.shape, seed=2)
    noise -= (noise * large).sum(1, keepdim=True) / (large * large).sum(1, keepdim=True) * large
    noise *= 1e-5 * large.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    before = large.float()
    after = (large * (1 + radial) + noise).float()
    expected = reference(before, after)
    change = dd.weight_change(before.to(device), after.to(device))
    assert relative_error(change.delta_direction, expected["delta_direction"]) <= 1e-5
    assert relative_error(change.delta_magnitude, expected["delta_magnitude"]) <= 1e-6
    assert change.radial_share == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative", [2.0, 0.1, 0.01])
def test_every_unit_of_every_shape_and_dtype(
    shape: tuple[int, int], dtype: torch.dtype, relative: float, device: str
) -> None:
    weight = randn(*shape, seed=sum(shape))
    before, after = weight.to(dtype), perturbed(weight, relative).to(dtype)
    expected = reference(before, after)
    change = dd.weight_change(before.to(device), after.to(device))
    assert len(change.units) == shape[0]
    # Terms may be fp32 where the weights are; sums and what is made of them are fp64.
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    difference = expected["units.magnitude_difference"]
    error = np.abs(change.units.magnitude_difference - difference)
    assert (error <= tolerance * (expected["units.update_norm"] + np.abs(difference))).all()
    np.testing.assert_allclose(
        change.units.one_minus_cosine,
        expected["units.one_minus_cosine"].astype(float),
        rtol=10 * tolerance,
        atol=1e-20,
    )
    for name in ("magnitude_before", "update_norm"):
        assert relative_error(getattr(change, name), expected[name]) <= tolerance, name


@pytest.mark.parametrize("angle", [3.1, 2.0, np.pi / 2, 0.5, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("stretch", [0.5, 1.0, 1.01, 7.0])
def test_known_rotation_and_stretch(angle: float, stretch: float) -> None:
    axes, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))
    start, across = axes[:12], axes[12:]
    lengths = np.linspace(0.1, 40, 12)[:, None]
    after = stretch * lengths * (np.cos(angle) * start + np.sin(angle) * across)
    change = dd.weight_change(torch.from_numpy(lengths * start), torch.from_numpy(after))
    one_minus_cosine = 2 * np.sin(angle / 2) ** 2
    # The stored numbers hold the angle to some 1e-16 only.
    np.testing.assert_allclose(
        change.units.one_minus_cosine, one_minus_cosine, rtol=1e-14 + 2e-15 / angle
    )
    np.testing.assert_allclose(
        change.units.magnitude_difference, (stretch - 1) * lengths[:, 0], rtol=1e-12, atol=1e-13
    )
    along = (stretch * np.cos(angle) - 1) * lengths[:, 0]
    np.testing.assert_allclose(change.units.radial_update, along, rtol=1e-9, atol=1e-13)
    total = stretch**2 - 2 * stretch * np.cos(angle) + 1
    if total > 1e-3:
        share = (stretch * np.cos(angle) - 1) ** 2 / total
        assert change.radial_share == pytest.approx(share, rel=1e-9)


def test_pure_stretch_does_not_turn_and_no_change_is_exactly_zero() -> None:
    weight = randn(30, 41)
    stretched = dd.weight_change(weight, 1.3 * weight)
    assert stretched.delta_direction < 1e-30
    assert stretched.radial_share == pytest.approx(1.0, abs=1e-15)
    same = dd.weight_change(weight, weight.clone())
    assert (same.delta_magnitude, same.delta_direction, same.update_norm) == (0, 0, 0)
    assert np.isnan(same.radial_share)


def test_opposite_weight_has_turned_by_two() -> None:
    weight = randn(9, 4)
    change = dd.weight_change(weight, -weight)
    np.testing.assert_array_equal(change.units.one_minus_cosine, 2.0)
    assert change.delta_magnitude == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative", [0.3, 1e-3])
def test_input_axis_is_the_transpose(dtype: torch.dtype, relative: float, device: str) -> None:
    weight = randn(37, 11)
    before = weight.to(device, dtype)
    after = perturbed(weight, relative).to(device, dtype)
    rounding = 1e-11 if dtype == torch.float64 else 2e-6
    by_input = dd.weight_change(before, after, axis="input")
    transposed = dd.weight_change(before.T.contiguous(), after.T.contiguous(), axis="output")
    assert by_input.axis == "input"
    assert len(by_input.units) == 11
    for name in REDUCED:
        assert getattr(by_input, name) == pytest.approx(getattr(transposed, name), rel=rounding)
    np.testing.assert_allclose(
        by_input.units.one_minus_cosine, transposed.units.one_minus_cosine, rtol=rounding
    )
    assert by_input.delta_direction != dd.weight_change(before, after).delta_direction
    np.testing.assert_allclose(
        dd.magnitude(before, axis="input"), dd.magnitude(before.T), rtol=1e-14
    )
    torch.testing.assert_close(dd.direction(before, axis="input"), dd.direction(before.T).T)


def test_magnitude_and_direction_make_the_weight_again(device: str) -> None:
    weight = randn(8, 19).to(device)
    magnitude, direction = dd.magnitude(weight), dd.direction(weight)
    np.testing.assert_allclose(magnitude, np.linalg.norm(weight.cpu().numpy(), axis=1), rtol=1e-15)
    rebuilt = torch.from_numpy(magnitude).to(device)[:, None] * direction
    torch.testing.assert_close(rebuilt, weight, rtol=1e-14, atol=0)


def test_views_gradients_and_inputs_are_left_alone() -> None:
    storage = randn(20, 30, dtype=torch.float32)
    before = storage[::2, 3:24:3].requires_grad_(False)
    after = torch.nn.Parameter(perturbed(before.double(), 0.1).float())
    kept = storage.clone(), after.detach().clone()
    change = dd.weight_change(before, after)
    plain = dd.weight_change(before.contiguous(), after.detach())
    assert change.delta_direction == pytest.approx(plain.delta_direction, rel=1e-6)
    assert torch.equal(storage, kept[0])
    assert torch.equal(after.detach(), kept[1])
    assert after.grad is None


def test_what_only_looks_like_a_dense_matrix() -> None:
    before, after = randn(5, 7), randn(5, 7, seed=1)
    expected = dd.weight_change(before, after)
    conjugated = torch.complex(before, -before).conj().imag  # carries its minus sign as a bit
    assert conjugated.is_neg()
    assert dd.weight_change(conjugated, after).delta_direction == expected.delta_direction
    row = before[:1].expand(5, 7)
    assert dd.weight_change(row, after).delta_direction == pytest.approx(
        dd.weight_change(row.clone(), after).delta_direction, rel=1e-14
    )
    with torch.inference_mode():
        sealed = before.clone(), after.clone()
    assert dd.weight_change(*sealed).delta_direction == expected.delta_direction


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([2.0**-60, 2.0**-7, 1.0, 2.0**40]),
    relative=st.sampled_from([3.0, 1e-1, 1e-4, 1e-8]),
)
def test_bounds_and_symmetries(
    rows: int, columns: int, seed: int, scale: float, relative: float
) -> None:
    before = randn(rows, columns, seed=seed)
    after = perturbed(before, relative, seed=seed + 1)
    change = dd.weight_change(before, after)
    assert 0 <= change.delta_direction <= 2
    assert abs(change.signed_delta_magnitude) <= change.delta_magnitude * (1 + 1e-12)
    assert change.delta_magnitude <= change.update_norm * (1 + 1e-12)
    assert 0 <= change.radial_share <= 1 + 1e-12
    # Powers of two scale without rounding, and the order of the units says nothing.
    scaled = dd.weight_change(before * scale, after * scale)
    np.testing.assert_allclose(
        scaled.units.one_minus_cosine, change.units.one_minus_cosine, rtol=1e-14
    )
    assert scaled.delta_magnitude == pytest.approx(scale * change.delta_magnitude, rel=1e-14)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    shuffled = dd.weight_change(before[order], after[order])
    assert shuffled.delta_magnitude == pytest.approx(change.delta_magnitude, rel=1e-13)
    # ΔD does not know which weight came first; the signed ΔM turns its sign.
    back = dd.weight_change(after, before)
    np.testing.assert_allclose(
        back.units.one_minus_cosine, change.units.one_minus_cosine, rtol=1e-6, atol=1e-30
    )
    np.testing.assert_allclose(
        back.units.magnitude_difference,
        -change.units.magnitude_difference,
        rtol=1e-6,
        atol=1e-15 * float(before.norm()),
    )


class TestDegenerate:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zero_units_have_a_magnitude_but_no_direction(
        self, dtype: torch.dtype, device: str
    ) -> None:
        before = torch.tensor([[3.0, 4.0], [0, 0], [1, 0], [0, 0]], dtype=dtype, device=device)
        after = torch.tensor([[3.0, 4.0], [3, 4], [0, 0], [0, 0]], dtype=dtype, device=device)
        change = dd.weight_change(before, after)
        np.testing.assert_array_equal(change.units.magnitude_difference, [0, 5, -1, 0])
        np.testing.assert_array_equal(change.units.one_minus_cosine, [0, np.nan, np.nan, np.nan])
        assert (change.zero_units, change.non_finite) == (3, 0)
        assert change.delta_magnitude == 1.5
        assert change.delta_direction == 0.0
        assert change.relative_delta_magnitude == 0.5
        np.testing.assert_allclose(change.update_norm, np.sqrt(26), rtol=1e-15)

    def test_weight_of_zeros(self) -> None:
        change = dd.weight_change(torch.zeros(3, 2), torch.ones(3, 2))
        assert change.zero_units == 3
        assert np.isnan(change.delta_direction)
        assert np.isnan(change.relative_delta_magnitude)
        assert change.delta_magnitude == pytest.approx(np.sqrt(2))
        assert torch.isnan(dd.direction(torch.zeros(3, 2))).all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("side", ["before", "after", "both"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("row", [0, 2])
    def test_non_finite_is_reported_and_never_averaged(
        self, bad: float, side: str, dtype: torch.dtype, row: int, device: str
    ) -> None:
        before = randn(5, 3).to(dtype)
        before[2] = 0  # also where it could hide behind a unit without direction
        after = before.clone() * 1.5
        for weight, name in ((before, "before"), (after, "after")):
            if side in (name, "both"):
                weight[row, 1] = bad
        change = dd.weight_change(before.to(device), after.to(device))
        assert change.non_finite == 1
        for name in [*REDUCED, "radial_share"]:
            assert np.isnan(getattr(change, name)), name
        finite = np.delete(np.arange(5), [row, 2])
        np.testing.assert_allclose(
            change.units.magnitude_difference[finite],
            0.5 * change.units.magnitude_before[finite],
            rtol=0.01,
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_norms_beyond_the_dtype_are_no_overflow(self, dtype: torch.dtype) -> None:
        largest = torch.finfo(dtype).max
        before = torch.full((2, 50), largest / 2, dtype=dtype)
        after = torch.full((2, 50), largest, dtype=dtype)
        change = dd.weight_change(before, after)
        assert change.non_finite == 0
        assert change.delta_magnitude == pytest.approx(largest / 2 * np.sqrt(50), rel=1e-2)
        smallest = torch.full((2, 3), torch.finfo(dtype).smallest_normal, dtype=dtype)
        assert dd.weight_change(smallest, 2 * smallest).zero_units == 0


class TestRefusals:
    weight = torch.ones(3, 2)

    def test_different_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(3, 2\) but after has shape \(2, 3\)"):
            dd.weight_change(self.weight, self.weight.T)

    def test_different_dtypes(self) -> None:
        with pytest.raises(TypeError, match=r"torch.float32 but after is torch.bfloat16"):
            dd.weight_change(self.weight, self.weight.bfloat16())

    def test_different_devices(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        with pytest.raises(ValueError, match="before is on cpu but after is on cuda"):
            dd.weight_change(self.weight, self.weight.to("cuda"))

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
    def test_empty(self, shape: tuple[int, int]) -> None:
        empty = torch.empty(shape)
        for refuse in (dd.magnitude, dd.direction, lambda w: dd.weight_change(w, w)):
            with pytest.raises(ValueError, match=r"is empty: its shape is \("):
                refuse(empty)

    @pytest.mark.parametrize("shape", [(), (3,), (3, 2, 1)])
    def test_no_matrix(self, shape: tuple[int, ...]) -> None:
        for refuse in (dd.magnitude, dd.direction, lambda w: dd.weight_change(w, w)):
            with pytest.raises(ValueError, match=r"must be a matrix of shape \(out, in\)"):
                refuse(torch.ones(shape))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
    def test_no_floating_point(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"before must be a floating-point tensor, not {dtype}"):
            dd.weight_change(torch.ones(3, 2, dtype=dtype), self.weight)

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
    def test_no_dense_values(self) -> None:
        for absent, what in (
            (self.weight.to("meta"), "on the meta device"),
            (self.weight.to_sparse(), "stored as torch.sparse_coo"),
            (self.weight.to_sparse_csr(), "stored as torch.sparse_csr"),
        ):
            for refuse in (dd.magnitude, dd.direction, lambda w: dd.weight_change(w, w)):
                with pytest.raises(InputError, match=f"is {what}: give a dense tensor"):
                    refuse(absent)

    def test_no_tensor(self) -> None:
        with pytest.raises(TypeError, match=r"after must be a torch tensor, not ndarray\."):
            dd.weight_change(self.weight, np.ones((3, 2)))  # type: ignore[arg-type]

    def test_unknown_axis(self) -> None:
        for refuse in (dd.magnitude, dd.direction):
            with pytest.raises(ValueError, match="axis must be 'output' or 'input', not 'row'"):
                refuse(self.weight, axis="row")  # type: ignore[arg-type]


def test_reduction_over_stored_units_is_the_same() -> None:
    change = dd.weight_change(randn(6, 4), randn(6, 4, seed=1))
    again = reduce_units(change.units, "output")
    assert [getattr(again, n) for n in REDUCED] == [getattr(change, n) for n in REDUCED]
