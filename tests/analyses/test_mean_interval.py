"""The interval of a mean against scipy's test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analyses._mean_interval import mean_interval


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_of_paired_differences_it_is_that_of_the_paired_t_test(n: int) -> None:
    one, other = np.random.default_rng(n).normal(size=(2, n))
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert mean_interval(one - other) == pytest.approx([(one - other).mean(), *expected], rel=1e-12)


def test_of_one_value_or_none_there_is_no_interval() -> None:
    assert mean_interval([2.5]) == pytest.approx((2.5, np.nan, np.nan), nan_ok=True)
    assert mean_interval([]) == pytest.approx((np.nan,) * 3, nan_ok=True)
