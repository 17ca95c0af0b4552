"""Correlations against scipy, at every size and offset, and everything undefined."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats

from dora_dynamics.correlation import pearson, slope, spearman

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Pair = tuple[NDArray[np.float64], NDArray[np.float64]]

CORRELATIONS = [pearson, spearman]
PLAIN = [*CORRELATIONS, slope]


def points(n: int, *, ties: bool, seed: int = 0) -> Pair:
    rng = np.random.default_rng([seed, n])
    x = rng.normal(size=n)
    y = 0.5 * x + rng.normal(size=n)
    if ties:
        x, y = np.round(x), np.round(y)
        x[0], y[-1] = x[0] + 1, y[-1] - 1
    return x, y


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [5, 7, 31, 101])
def test_plain_versions_equal_scipy(n: int, ties: bool) -> None:
    x, y = points(n, ties=ties)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-13)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-13)
    assert slope(x, y) == pytest.approx(stats.linregress(x, y).slope, abs=1e-13)


def test_three_points_are_enough_for_a_correlation_and_two_for_a_slope() -> None:
    assert pearson([1, 2, 4], [3, 1, 2]) == pytest.approx(
        stats.pearsonr([1, 2, 4], [3, 1, 2]).statistic
    )
    assert spearman([1, 2, 4], [3, 1, 2]) == pytest.approx(-0.5)
    assert slope([1, 3], [5, 9]) == pytest.approx(2)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-12, 1e12, 1e300])
def test_size_does_not_matter(scale: float) -> None:
    x, y = np.array([1.0, 2, 3, 5, 8]), np.array([2.0, 1, 4, 3, 9])
    digits = 1e-3 if scale == 1e-320 else 1e-12  # subnormal numbers hold few digits themselves
    assert pearson(scale * x, y) == pytest.approx(pearson(x, y), rel=digits)
    assert pearson(x, scale * y) == pytest.approx(pearson(x, y), rel=digits)
    assert spearman(scale * x, scale * y) == pytest.approx(spearman(x, y))
    assert slope(scale * x, scale * y) == pytest.approx(slope(x, y), rel=digits)


def test_a_large_common_offset_does_not_matter() -> None:
    x, y = np.array([1.0, 2, 3, 5, 8]), np.array([2.0, 1, 4, 3, 9])
    assert pearson(2.0**40 + x, y) == pytest.approx(pearson(x, y), abs=1e-13)
    assert slope(2.0**40 + x, 2.0**40 + y) == pytest.approx(slope(x, y), abs=1e-13)


def test_a_perfect_line_stays_within_one() -> None:
    x = np.random.default_rng(4).normal(size=1000)
    assert 1 - 1e-12 < pearson(x, 3 * x + 1) <= 1
    assert -1 <= pearson(x, -x / 7) < -1 + 1e-12


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([1.0, np.nan, 3.0, 4.0], [1.0, 2.0, 3.0, 5.0]),
        ([1.0, 2.0, 3.0, 4.0], [1.0, np.inf, 3.0, 5.0]),
        ([2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 5.0]),
    ],
    ids=["empty", "one point", "NaN", "infinite", "constant x"],
)
def test_undefined_is_nan(
    plain: Callable[[list[float], list[float]], float], x: list[float], y: list[float]
) -> None:
    assert np.isnan(plain(x, y))


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_two_points_or_a_constant_y_have_no_correlation(
    correlation: Callable[[list[float], list[float]], float],
) -> None:
    assert np.isnan(correlation([1, 2], [3, 5]))
    assert np.isnan(correlation([1, 2, 3], [4, 4, 4]))


def test_a_constant_y_has_slope_zero() -> None:
    assert slope([1, 2, 3], [4, 4, 4]) == 0


@pytest.mark.parametrize("plain", PLAIN)
def test_variation_of_the_size_of_rounding_is_none(
    plain: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
) -> None:
    y = np.arange(10.0)
    noise = 0.1 + np.array([0, 1, 0, 2, 1, 0, 1, 2, 0, 1]) * np.spacing(0.1)
    assert np.ptp(noise) > 0
    assert np.isnan(plain(noise, y))
    assert np.isfinite(plain(0.1 + 1e-9 * y, y))


@pytest.mark.parametrize("plain", PLAIN)
def test_shapes_that_do_not_pair_up_are_refused(
    plain: Callable[[object, object], float],
) -> None:
    with pytest.raises(ValueError, match=r"one length; got shapes \(2,\) and \(3,\)"):
        plain([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="1-D"):
        plain(np.ones((2, 2)), np.ones((2, 2)))
