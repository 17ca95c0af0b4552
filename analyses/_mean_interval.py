"""What a few independent values say of their mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Iterable


def mean_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Their mean, and the ends of its 95% interval of Student's t.

    Of differences that are paired by seed this is the paired t interval. A single value has a mean
    and no interval, no value has neither: NaN.
    """
    found = np.array(list(values), np.float64)
    n = len(found)
    mean = float(found.mean()) if n else math.nan
    half = float(stats.sem(found) * stats.t.ppf(0.975, n - 1)) if n > 1 else math.nan
    return mean, mean - half, mean + half
