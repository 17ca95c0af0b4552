"""Intervals and p-values of a coupling: against textbooks, explicit loops and simulations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dora_dynamics.statistics import Level, coupling
from tests.conftest import campaign
from tests.simulated import BOUNDS, CELLS, ESTIMATES, UNIT_COLUMNS, one, simulated

if TYPE_CHECKING:
    from dora_dynamics.statistics.cell import IntArray


def test_the_jackknife_interval_is_the_textbooks_on_one_run() -> None:
    trajectory = simulated(runs=1, steps=1)
    x, y = trajectory["delta_direction"], trajectory["delta_magnitude"]
    without = [stats.linregress(x.drop(i), y.drop(i)).slope for i in range(6)]
    error = np.sqrt(5 / 6 * np.sum((without - np.mean(without)) ** 2))
    reach = stats.t.ppf(0.95, 5) * error
    found = one(trajectory, confidence=0.9, interval="jackknife")
    assert found["slope_high"] - found["slope"] == pytest.approx(reach)
    assert found["slope"] - found["slope_low"] == pytest.approx(reach)

    z = np.arctanh([stats.pearsonr(x.drop(i), y.drop(i)).statistic for i in range(6)])
    reach = stats.t.ppf(0.95, 5) * np.sqrt(5 / 6 * np.sum((z - z.mean()) ** 2))
    assert found["pearson_low"] == pytest.approx(np.tanh(np.arctanh(found["pearson"]) - reach))


def test_runs_that_disagree_widen_the_interval() -> None:
    def width(trajectory: pd.DataFrame) -> float:
        found = one(trajectory)
        return float(found["slope_high"] - found["slope_low"])

    agreeing = simulated(runs=1)
    steeper = agreeing.assign(run="steeper", delta_magnitude=4 * agreeing["delta_magnitude"])
    assert width(pd.concat([agreeing, steeper])) > 2 * width(
        pd.concat([agreeing, agreeing.assign(run="again")])
    )


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("level", [*CELLS, "units"])
def test_the_bootstrap_interval_equals_an_explicit_loop(level: Level, runs: int) -> None:
    trajectory = simulated(runs=runs, steps=4, seed=1)
    trajectory = trajectory.drop(index=[0, 9]).reset_index(drop=True)  # ragged
    found = one(trajectory, level, interval="bootstrap", resamples=25, seed=5, confidence=0.9)

    rng = np.random.default_rng(5)
    layer_counts = rng.multinomial(6, [1 / 6] * 6, size=25)
    run_counts = rng.multinomial(runs, [1 / runs] * runs, size=25)
    drawn = [
        resampled(trajectory, level, layers, copies)
        for layers, copies in zip(layer_counts, run_counts, strict=True)
        if np.count_nonzero(layers) >= 3
    ]
    ones = np.ones(6, dtype=int), np.ones(runs, dtype=int)
    left = [[resampled(trajectory, level, ones[0] - row, ones[1]) for row in np.eye(6, dtype=int)]]
    if runs > 1:
        left.append(
            [
                resampled(trajectory, level, ones[0], ones[1] - row)
                for row in np.eye(runs, dtype=int)
            ]
        )
    centre = resampled(trajectory, level, *ones)
    for k, name in enumerate(ESTIMATES):
        low, high = np.nanquantile([values[k] for values in drawn], [0.1, 0.9])
        parts = [(len(v) - 1) * np.var([values[k] for values in v]) for v in left]
        share = np.array(parts) / sum(parts)
        freedom = 1 / sum(share**2 / [len(v) - 1 for v in left])
        factor = 1 / sum(share * [1 - 1 / len(v) for v in left])
        spread = (high - low) / (stats.norm.ppf(0.9) - stats.norm.ppf(0.1)) * np.sqrt(factor)
        for side, sign in (("low", -1), ("high", 1)):
            bound = centre[k] + sign * stats.t.ppf(0.95, freedom) * spread
            bound = bound if name == "slope" else np.tanh(bound)
            assert found[f"{name}_{side}"] == pytest.approx(bound, abs=1e-9), name


def resampled(
    trajectory: pd.DataFrame, level: Level, layers: IntArray, runs: IntArray
) -> list[float]:
    """Fisher's z of both correlations, and the slope, of rows written out as often as drawn."""
    copies = pd.concat(
        [
            trajectory[(trajectory["run"] == f"run{run}") & (trajectory["layer"] == layer)].assign(
                run=f"{run}.{copy}", site=f"{layer}.{again}"
            )
            for run, layer in np.ndindex(len(runs), len(layers))
            for copy in range(runs[run])
            for again in range(layers[layer])
        ]
    )
    if level == "units":
        r, rho, slope = (copies[f"unit_{name}"].mean() for name in UNIT_COLUMNS)
        return [np.arctanh(r), np.arctanh(rho), slope]
    cells, sxy, sxx = [], 0.0, 0.0
    for _, cell in copies.groupby(CELLS[level], dropna=False):
        x, y = (cell[f"delta_{name}"].to_numpy() for name in ("direction", "magnitude"))
        sxy += float(np.sum((x - x.mean()) * (y - y.mean())))
        sxx += float(np.sum((x - x.mean()) ** 2))
        if len(np.unique(x)) >= 3:
            ranks = stats.rankdata(x), stats.rankdata(y)
            cells.append((len(x), np.corrcoef(x, y)[0, 1], np.corrcoef(*ranks)[0, 1]))
    if not cells:
        return [np.nan, np.nan, sxy / sxx]
    size, r, rho = np.array(cells).T
    means = np.average([r, rho], weights=size, axis=1)
    return [*np.arctanh(np.clip(means, -1 + 1e-15, 1 - 1e-15)), sxy / sxx]


def test_resamples_of_few_layers_do_not_blow_up_the_interval() -> None:
    draws = pd.concat(
        [simulated(runs=1, layers=5, seed=seed).assign(method=seed) for seed in range(20)]
    )
    width = {}
    for kind in ("bootstrap", "jackknife"):
        found = coupling(draws, "method", interval=kind, permutations=0)
        assert found[BOUNDS].notna().to_numpy().all()
        width[kind] = (found["pearson_high"] - found["pearson_low"]).median()
    assert width["bootstrap"] < 1.2 * width["jackknife"]


@pytest.mark.campaign
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("interval", ["bootstrap", "jackknife"])
def test_the_interval_covers_the_truth(interval: str, runs: int) -> None:
    draws = pd.concat(
        [
            simulated(runs=runs, rho=0.7, seed=seed).assign(method=seed)
            for seed in range(campaign(75, 150))
        ]
    )
    found = coupling(draws, "method", interval=interval, resamples=200, permutations=0)  # type: ignore[arg-type]
    for name in ("pearson", "slope"):
        covered = (found[f"{name}_low"] <= 0.7) & (found[f"{name}_high"] >= 0.7)
        assert 0.90 <= covered.mean() <= 1
    assert (found["pearson_high"] - found["pearson_low"]).median() < 1.5


@pytest.mark.campaign
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("level", [*CELLS, "units"])
def test_without_a_relation_the_p_value_is_about_uniform(level: Level, missing: float) -> None:
    draws = pd.concat(
        [
            simulated(runs=2, layers=7, steps=5, rho=0, seed=seed).assign(method=seed)
            for seed in range(campaign(60, 120))
        ]
    )
    if level in ("pooled", "within_layer"):  # whose steps must be exchangeable, so: no layer effect
        rng = np.random.default_rng(0)
        draws["delta_magnitude"] = rng.normal(size=len(draws))
    draws = draws.sample(frac=1 - missing, random_state=0)
    p = coupling(draws, "method", level, resamples=1, permutations=199)["p_value"]
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert 0 < (p <= 0.1).mean() < 0.2


@pytest.mark.parametrize("level", CELLS)
def test_a_strong_relation_has_the_smallest_p_value(level: Level) -> None:
    trajectory = simulated(rho=0.99, layers=8, steps=8)
    assert one(trajectory, level, permutations=199)["p_value"] == 1 / 200


def test_few_layers_bound_the_p_value_from_below() -> None:
    trajectory = simulated(runs=1, layers=3, rho=0.999)
    assert one(trajectory, permutations=2000)["p_value"] == pytest.approx(1 / 6, abs=0.03)
    positive = simulated(runs=1, layers=6).assign(unit_coupling=0.5)
    assert one(positive, "units", permutations=4000)["p_value"] == pytest.approx(2 / 64, abs=0.01)


def test_a_perfect_line_has_an_interval_of_no_width() -> None:
    trajectory = simulated()
    found = one(trajectory.assign(delta_magnitude=2 * trajectory["delta_direction"]))
    assert found["pearson"] == pytest.approx(1)
    assert found["pearson_low"] == pytest.approx(1)
    assert found["slope_low"] == pytest.approx(2)
    assert found["slope_high"] == pytest.approx(2)


@pytest.mark.parametrize("interval", ["bootstrap", "jackknife"])
def test_three_layers_have_an_estimate_but_no_interval(interval: str) -> None:
    found = one(simulated(layers=3), interval=interval)
    assert np.isfinite(found[ESTIMATES].astype(float)).all()
    assert found[BOUNDS].isna().all()
    assert found["reason"] == "an interval needs at least 4 layers (there are 3)"
    assert np.isfinite(found["p_value"])


def test_a_run_that_alone_carries_a_statistic_leaves_no_interval() -> None:
    trajectory = simulated()
    partly = trajectory.assign(
        unit_slope=trajectory["unit_slope"].where(trajectory["run"] == "run0")
    )
    found = one(partly, "units")
    assert np.isfinite(found[["slope", "pearson_low"]].astype(float)).all()
    assert np.isnan(found["slope_low"])
    assert found["reason"] == (
        "too few points are left for an interval when a layer or run is left out"
    )
    none = one(trajectory.assign(unit_slope=np.nan), "units")
    assert np.isnan(none["slope"])
    assert none["reason"] == "no finite values of the slope inside matrices"


def test_no_permutations_no_p_value() -> None:
    found = one(simulated(), permutations=0)
    assert np.isnan(found["p_value"])
    assert found["reason"] == "no permutations were asked for"
