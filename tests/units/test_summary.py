"""What a row says of many weights at once, by numpy and by torch, against scipy of each alone."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from dora_dynamics.units import batches as unit_batches
from dora_dynamics.units.arithmetic import MEASURES, rescaled, unit_arrays
from dora_dynamics.units.batches import batched_sums
from dora_dynamics.units.summary import UnitSummary, finished, summary_sums, summary_terms

if TYPE_CHECKING:
    from collections.abc import Callable

    Units = np.ndarray[Any, np.dtype[np.float64]]

LIBRARIES = [np.asarray, torch.from_numpy]
RELATIONS = ("pearson", "spearman", "slope")
COLUMNS = [
    *(*MEASURES, "unit_coupling", "unit_rank_coupling", "unit_slope"),
    *("signed_unit_coupling", "signed_unit_rank_coupling", "signed_unit_slope"),
]


def plain(n: int, seed: int = 0) -> Units:
    """Six arrays of a change, as far as the statistics look at them."""
    rng = np.random.default_rng([n, seed])
    m_0, turned = rng.uniform(1, 2, n), rng.uniform(1e-8, 1e-4, n)
    difference = rng.normal(size=n) * 1e-3 + 3 * turned
    update = turned + difference**2
    return np.stack([m_0, m_0 + difference, difference, turned, update, difference / 2])


def ties(n: int) -> Units:
    units = plain(n, 1)
    units[3] = np.ceil(units[3] * 5e4) / 5e4
    units[2] = np.round(units[2], 3)
    return units


def constant(n: int, which: int) -> Units:
    units = plain(n, 2)
    units[which] = 0.1
    units[which, ::2] = np.nextafter(0.1, 1)  # varies by less than it is worth
    return units


def zeros(n: int, most: int) -> Units:
    """Units of zero norm before or after, which have no direction."""
    units = plain(n, 3)
    which = np.random.default_rng(n).permutation(n)[:most]
    before, after = which[::2], which[1::2]
    units[0, before], units[1, after] = 0, 0
    units[3, which] = np.nan
    return units


def with_value(n: int, row: int, value: float) -> Units:
    units = plain(n, 4)
    units[row, n // 2] = value
    if row in (0, 1):
        units[2:4, n // 2] = np.nan
    return units


def scaled(n: int, factor: float) -> Units:
    units = plain(n, 5)
    units[:3] *= factor
    units[3] *= 1e-11
    return units


CASES: dict[str, Callable[[int], list[Units]]] = {
    "plain": lambda n: [plain(n, seed) for seed in range(3)],
    "ties": lambda n: [ties(n)],
    "constant": lambda n: [constant(n, 2), constant(n, 3)],
    "zero units": lambda n: [zeros(n, most) for most in (1, 3, n - 2, n - 1, n) if 0 < most <= n],
    "not finite": lambda n: [
        with_value(n, row, value) for row in (0, 1) for value in (np.nan, np.inf)
    ],
    "of any size": lambda n: [scaled(n, 1e-290), scaled(n, 1e140)],
}


def expected(units: Units) -> list[float]:
    """The same numbers of one weight from scipy and the definitions."""
    m_0, m, difference, turned, update, radial = units
    directed = (m_0 != 0) & (m != 0)
    bad = ~(np.isfinite(m_0) & np.isfinite(m))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = [
            np.abs(difference).mean(),
            turned[directed].mean(),
            difference.mean(),
            (np.abs(difference[m_0 != 0]) / m_0[m_0 != 0]).mean(),
            m_0.mean(),
            np.sqrt(update.sum()),
            (radial**2).sum() / update.sum(),
        ]
    found = [np.nan] * 7 if bad.any() else found
    found += [(~directed).sum(), bad.sum()]
    for y in (np.abs(difference), difference):
        found += related(turned[directed], y[directed])
    return [float(number) for number in found]


def related(x: Units, y: Units) -> list[float]:
    def noise(values: Units) -> bool:
        return bool(np.ptp(values) < 1e-12 * np.abs(values).max())

    if len(x) < 2 or not np.isfinite([x, y]).all() or noise(x):
        return [np.nan] * 3
    factors = [2.0 ** -np.frexp(np.abs(values).max())[1] for values in (x, y)]
    x, y = x * factors[0], y * factors[1]  # scipy's own squares would underflow
    slope = float(stats.linregress(x, y).slope / factors[1] * factors[0])
    if len(x) < 3 or noise(y):
        return [np.nan, np.nan, slope]
    return [float(stats.pearsonr(x, y).statistic), float(stats.spearmanr(x, y).statistic), slope]


def numbers_of(units: Any) -> Units:
    """Shape (15, weights), from six arrays of shape (weights, units)."""
    sums = np.asarray(summary_sums(summary_terms(units)))
    return columns(finished(sums, [units.shape[2]] * units.shape[1]))


def columns(summaries: list[UnitSummary]) -> Units:
    return np.array([[getattr(one, name) for name in COLUMNS] for one in summaries]).T


@pytest.mark.parametrize("library", LIBRARIES, ids=["numpy", "torch"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 37, 500])
def test_each_weight_is_what_it_is_alone(n: int, case: str, library: Callable[..., Any]) -> None:
    weights = [*CASES[case](n), plain(n, 9)]
    found = numbers_of(library(np.stack(weights, axis=1)))
    names = (*MEASURES, *RELATIONS, *RELATIONS)
    for numbers, units in zip(found.T, weights, strict=True):
        for name, one, other in zip(names, numbers, expected(units), strict=True):
            small = 1e-11 if name in ("pearson", "spearman") else 0.0
            if case == "constant" and name == "slope":
                small = 1e-9  # of rounding
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=small, err_msg=name)
    for i, units in enumerate(weights):
        alone = numbers_of(library(units[:, None]))
        if library is np.asarray:  # to the last bit: rows recorded together are measured again
            np.testing.assert_array_equal(found[:, i], alone[:, 0])
        else:
            np.testing.assert_allclose(found[:, i], alone[:, 0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("at_a_time", [12, 50, 1000])
@pytest.mark.parametrize("library", LIBRARIES, ids=["numpy", "torch"])
def test_weights_of_all_lengths_and_in_pieces(
    library: Callable[..., Any], at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_batches, "_HOST_UNITS", 20)
    monkeypatch.setattr(unit_batches, "_DEVICE_UNITS", at_a_time)
    units = np.concatenate([plain(60), ties(60), zeros(60, 5)], axis=1)
    weights = [((0, 7),), ((20, 60), (70, 75)), ((7, 14),), ((170, 180),), ((100, 103), (60, 64))]
    unit_batches._batches.cache_clear()
    unit_batches._stretches.cache_clear()
    found, order = batched_sums(list(library(units)), weights)
    unit_batches._batches.cache_clear()
    unit_batches._stretches.cache_clear()
    assert sorted(order) == list(range(5))
    counts = [unit_batches.length(weights[i]) for i in order]
    for i, numbers in zip(order, columns(finished(np.asarray(found), counts)).T, strict=True):
        own = np.concatenate([units[:, start:stop] for start, stop in weights[i]], axis=1)
        np.testing.assert_allclose(numbers, expected(own), rtol=1e-9, atol=1e-11)


class Calls(TorchDispatchMode):
    """Counts what is launched on a device: operations that are no view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def calls_for(lengths: list[int]) -> int:
    units = list(torch.from_numpy(plain(sum(lengths))))
    ends = np.cumsum(lengths)
    weights = [((int(end) - length, int(end)),) for end, length in zip(ends, lengths, strict=True)]
    batched_sums(units, weights)  # what is made once, and kept
    with Calls() as calls:
        batched_sums(units, weights)
    return len(calls.names)


def test_launches_grow_with_the_different_lengths_and_not_with_the_weights() -> None:
    one = calls_for([8])
    assert calls_for([8] * 100) == one <= 90
    llama = [32] * 44 + [8] * 44 + [64] * 44 + [32] * 22 + [100]
    assert calls_for(llama) <= one + 3 * 14  # three lengths more
    sums = torch.rand(4, 1000, dtype=torch.float64)
    with Calls() as calls:
        rescaled(unit_arrays(*sums), sums[3], sums[0])
    assert len(calls.names) <= 80


@pytest.mark.parametrize("dora", [False, True])
def test_both_libraries_make_the_same_of_the_sums(dora: bool) -> None:
    rng = np.random.default_rng(0)
    a, c = rng.uniform(0, 2, (2, 400))
    e = rng.uniform(-1, 1, 400) * np.sqrt(a * c)
    a[:3], c[2:5], e[:5] = 0, 0, 0
    a[7], e[8] = np.inf, np.nan
    P = c - np.divide(e**2, a, out=np.zeros(400), where=a > 0)
    m = rng.normal(size=400)
    m[20:23] = 0, np.nan, np.inf
    sums = [a, e, c, P]
    arrays = unit_arrays(*sums)
    tensors = unit_arrays(*map(torch.from_numpy, sums))
    if dora:
        arrays = rescaled(arrays, P, m)
        tensors = rescaled(tensors, torch.from_numpy(P), torch.from_numpy(m))
    for one, other in zip(arrays, tensors, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-14, atol=1e-300)
