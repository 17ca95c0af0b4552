"""Coupling against explicit loops, the paper's points, simulated truth; everything undefined."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import dora_dynamics.statistics
from dora_dynamics.errors import InputError
from dora_dynamics.statistics import Level, coupling, select_checkpoints

if TYPE_CHECKING:
    from dora_dynamics._cell import IntArray

ESTIMATES = ["pearson", "spearman", "slope"]
BOUNDS = [f"{name}_{side}" for name in ESTIMATES for side in ("low", "high")]
UNIT_COLUMNS = ["coupling", "rank_coupling", "slope"]
PAPER = Path(dora_dynamics.statistics.__file__).parent / "data" / "paper_figures_2_and_5.csv"


def simulated(
    *,
    runs: int = 2,
    layers: int = 6,
    steps: int = 4,
    heads: int = 0,
    rho: float = 0.7,
    seed: int = 0,
) -> pd.DataFrame:
    """A trajectory with random effects of layers that correlate by rho."""
    rng = np.random.default_rng(seed)
    shape = (runs, layers, max(heads, 1), steps)
    run, layer, head, step = (axis.ravel() for axis in np.indices(shape))
    mixing = np.linalg.cholesky([[1, rho], [rho, 1]])
    layer_effect = rng.normal(size=(2, 1, layers, 1, 1))
    x, y = np.tensordot(mixing, layer_effect + 0.5 * rng.normal(size=(2, *shape)), axes=1)
    inside = np.tanh(x.ravel())
    table = pd.DataFrame(
        {
            "run": [f"run{r}" for r in run],
            "method": "FT",
            "role": "query",
            "step": 10 * (step + 1),
            "site": [f"layers.{number}.query" for number in layer],
            "layer": layer,
            "stack": "",
            "head": head if heads else np.nan,
            "units": 8,
            "delta_direction": x.ravel(),
            "delta_magnitude": y.ravel(),
            "unit_coupling": inside,
            "unit_rank_coupling": inside**3,
            "unit_slope": 2 * inside,
        }
    )
    for name in ("delta_magnitude", "unit_coupling", "unit_rank_coupling", "unit_slope"):
        table[f"signed_{name}"] = -table[name]
    return table


def one(trajectory: pd.DataFrame, level: Level = "within_step", **options: object) -> pd.Series:
    """The coupling of a trajectory that is one group."""
    result = coupling(trajectory, level=level, **{"permutations": 50} | options)  # type: ignore[arg-type]
    assert len(result) == 1
    return result.iloc[0]


def by_loop(trajectory: pd.DataFrame, cells: list[str]) -> dict[str, float]:
    """The same estimates, cell by cell with scipy."""
    sizes, pearsons, spearmans, sxy, sxx = [], [], [], 0.0, 0.0
    for _, cell in trajectory.groupby(cells, dropna=False):
        x, y = cell["delta_direction"], cell["delta_magnitude"]
        if len(cell) < 3:
            continue
        sizes.append(len(cell))
        pearsons.append(stats.pearsonr(x, y).statistic)
        spearmans.append(stats.spearmanr(x, y).statistic)
        sxy += float(((x - x.mean()) * (y - y.mean())).sum())
        sxx += float(((x - x.mean()) ** 2).sum())
    return {
        "n": sum(sizes),
        "cells": len(sizes),
        "pearson": float(np.average(pearsons, weights=sizes)),
        "spearman": float(np.average(spearmans, weights=sizes)),
        "slope": sxy / sxx,
    }


CELLS: dict[Level, list[str]] = {
    "pooled": ["method"],
    "within_step": ["run", "step"],
    "within_layer": ["run", "site", "head"],
}


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("level", CELLS)
def test_estimates_equal_a_loop_with_scipy(level: Level, heads: int) -> None:
    trajectory = simulated(runs=3, layers=5, heads=heads)
    ragged = trajectory.drop(index=[0, 7, 8, 9, 21, 33, 34, 35, 36]).sample(frac=1, random_state=0)
    found = one(ragged, level)
    for name, value in by_loop(ragged, CELLS[level]).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert found["n"] + found["dropped"] == len(ragged)


def test_units_are_the_means_over_rows() -> None:
    trajectory = simulated()
    found = one(trajectory, "units")
    for name, column in zip(ESTIMATES, UNIT_COLUMNS, strict=True):
        assert found[name] == pytest.approx(trajectory[f"unit_{column}"].mean())
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert (found["n"], found["units"], found["layers"], found["runs"]) == (48, 8 * 48, 6, 2)


@pytest.mark.parametrize("level", [*CELLS, "units"])
def test_signed_reads_the_signed_columns(level: Level) -> None:
    trajectory = simulated()
    assert one(trajectory, level, signed=True)["pearson"] == pytest.approx(
        -one(trajectory, level)["pearson"]
    )
    assert one(trajectory, level, signed=True)["signed"]


def paper_points() -> pd.DataFrame:
    points = pd.read_csv(PAPER).rename(columns={"matrix": "role"})
    checkpoints = {name: number for number, name in enumerate(points["checkpoint"].unique(), 1)}
    points["step"] = points["checkpoint"].map(checkpoints)
    points["run"] = points["method"]
    points["site"] = [f"{s}.{n}" for s, n in zip(points["stack"], points["layer"], strict=True)]
    return points


def test_the_papers_points_pooled() -> None:
    found = coupling(paper_points(), level="pooled", permutations=99)
    assert list(zip(found["role"], found["method"], found["pearson"].round(2), strict=True)) == [
        ("query", "FT", -0.31),
        ("query", "LoRA", 0.96),
        ("query", "DoRA", -0.62),
        ("value", "FT", -0.54),
        ("value", "LoRA", 0.86),
        ("value", "DoRA", -0.95),
    ]
    assert found["slope"].round(2).tolist() == [-1.22, 3.76, -2.49, -0.30, 3.10, -2.04]
    assert (found["n"] == 48).all()
    assert (found["layers"] == 12).all()  # two stacks of six


def test_the_papers_points_within_a_checkpoint() -> None:
    points = paper_points().query("role == 'query'")
    found = coupling(points, by=("method", "step"), permutations=99)
    by_method = {name: rows["pearson"].tolist() for name, rows in found.groupby("method")}
    assert by_method["DoRA"] == pytest.approx([-0.97, -0.94, -0.09, -0.97], abs=0.0055)
    assert by_method["FT"] == pytest.approx([0.09, 0.01, 0.18, -0.51], abs=0.0055)
    assert (found["cells"] == 1).all()


def test_groups_keep_the_order_of_first_appearance_and_ignore_each_other() -> None:
    a, b = simulated(seed=1).assign(method="b"), simulated(seed=2).assign(method="a")
    both = coupling(pd.concat([a, b]), by="method", permutations=50)
    assert both["method"].tolist() == ["b", "a"]
    pd.testing.assert_frame_equal(
        both.tail(1).reset_index(drop=True), coupling(b, "method", permutations=50)
    )


def test_step_zero_and_non_finite_rows_are_left_out_and_counted() -> None:
    trajectory = simulated()
    start = trajectory[trajectory["step"] == 10].assign(
        step=0, delta_direction=0.0, delta_magnitude=0
    )
    broken = trajectory.copy()
    broken.loc[3, "delta_magnitude"] = np.nan
    broken.loc[9, "delta_direction"] = np.inf
    found = one(pd.concat([start, broken], ignore_index=True))
    expected = one(trajectory.drop(index=[3, 9]))
    assert found["dropped"] == len(start) + 2
    assert found[["n", *ESTIMATES, *BOUNDS]].equals(expected[["n", *ESTIMATES, *BOUNDS]])


def test_stacks_are_layers_of_their_own_and_a_site_without_layer_is_one() -> None:
    trajectory = simulated(runs=1, layers=4)
    other = trajectory.assign(stack="decoder", site="decoder." + trajectory["site"])
    embedding = trajectory[trajectory["layer"] == 0].assign(layer=np.nan, site="embedding")
    found = one(pd.concat([trajectory, other, embedding]))
    assert found["layers"] == 9
    bare = trajectory.drop(columns=["layer", "stack", "role", "head"])
    found = coupling(bare, "method", permutations=50).iloc[0]
    assert found["layers"] == 4
    assert found["pearson"] == one(trajectory)["pearson"]


def test_roles_of_one_layer_stay_together() -> None:
    query = simulated(runs=1)
    value = query.assign(role="value", site=query["site"].str.replace("query", "value"))
    both = coupling(pd.concat([query, value]), "method").iloc[0]
    alone = coupling(query, "method").iloc[0]
    assert (both["layers"], both["n"]) == (6, 48)
    # A copy of every point adds no layer, so it may make nothing more certain.
    for name in ("pearson_low", "pearson_high", "slope_low", "slope_high", "p_value"):
        assert both[name] == pytest.approx(alone[name], abs=1e-9)


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


@pytest.mark.parametrize("level", [*CELLS, "units"])
@pytest.mark.parametrize("interval", ["bootstrap", "jackknife"])
def test_a_seed_gives_the_same_table_again_and_leaves_global_state_alone(
    level: Level, interval: str
) -> None:
    trajectory = simulated()
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first, again, other = (
        one(trajectory, level, interval=interval, resamples=50, seed=seed) for seed in (3, 3, 4)
    )
    assert first.equals(again)
    assert first[ESTIMATES].equals(other[ESTIMATES])
    assert first[BOUNDS].equals(other[BOUNDS]) == (interval == "jackknife")
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]


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


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("interval", ["bootstrap", "jackknife"])
def test_the_interval_covers_the_truth(interval: str, runs: int) -> None:
    draws = pd.concat(
        [simulated(runs=runs, rho=0.7, seed=seed).assign(method=seed) for seed in range(150)]
    )
    found = coupling(draws, "method", interval=interval, resamples=200, permutations=0)  # type: ignore[arg-type]
    for name in ("pearson", "slope"):
        covered = (found[f"{name}_low"] <= 0.7) & (found[f"{name}_high"] >= 0.7)
        assert 0.90 <= covered.mean() <= 1
    assert (found["pearson_high"] - found["pearson_low"]).median() < 1.5


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("level", [*CELLS, "units"])
def test_without_a_relation_the_p_value_is_about_uniform(level: Level, missing: float) -> None:
    draws = pd.concat(
        [
            simulated(runs=2, layers=7, steps=5, rho=0, seed=seed).assign(method=seed)
            for seed in range(120)
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


def test_values_of_any_size_give_the_same_correlation() -> None:
    trajectory = simulated()
    tiny = trajectory.assign(
        delta_direction=trajectory["delta_direction"] * 1e-200,
        delta_magnitude=trajectory["delta_magnitude"] * 1e-200,
    )
    a, b = one(trajectory), one(tiny)
    for name in [*ESTIMATES, *BOUNDS, "p_value"]:
        assert a[name] == pytest.approx(b[name], rel=1e-9)


@pytest.mark.parametrize("interval", ["bootstrap", "jackknife"])
@pytest.mark.parametrize("level", CELLS)
def test_a_slope_beyond_floating_point_has_a_reason(level: Level, interval: str) -> None:
    trajectory = simulated()
    steep = trajectory.assign(
        delta_direction=trajectory["delta_direction"] * 1e-200,
        delta_magnitude=trajectory["delta_magnitude"] * 1e200,
    )
    a, b = (one(table, level, interval=interval) for table in (trajectory, steep))
    for name in ("pearson", "pearson_low", "spearman_high", "p_value"):
        assert a[name] == pytest.approx(b[name], rel=1e-9)
    assert b[["slope", "slope_low", "slope_high"]].isna().all()
    assert "no finite values of the slope below 1e150" in b["reason"]


def test_a_perfect_line_has_an_interval_of_no_width() -> None:
    trajectory = simulated()
    found = one(trajectory.assign(delta_magnitude=2 * trajectory["delta_direction"]))
    assert found["pearson"] == pytest.approx(1)
    assert found["pearson_low"] == pytest.approx(1)
    assert found["slope_low"] == pytest.approx(2)
    assert found["slope_high"] == pytest.approx(2)


NOTHING = [
    (
        "pooled",
        lambda t: t.assign(delta_magnitude=np.nan),
        "no rows after step 0 have finite values of delta_direction and delta_magnitude",
    ),
    ("pooled", lambda t: t.head(2), "fewer than 3 points in the group"),
    ("within_step", lambda t: t[t["layer"] < 2], "fewer than 3 points at any step of a run"),
    ("within_layer", lambda t: t[t["step"] < 30], "fewer than 3 points at any site"),
    ("pooled", lambda t: t.assign(delta_magnitude=0.1), "delta_magnitude does not vary"),
    (
        "within_step",
        lambda t: t.assign(delta_direction=t["step"] * 0.1),
        "delta_direction or delta_magnitude does not vary at any step of a run",
    ),
    (
        "units",
        lambda t: t.assign(unit_coupling=np.nan),
        "no rows after step 0 have finite values of unit_coupling",
    ),
]


@pytest.mark.parametrize(("level", "change", "reason"), NOTHING)
def test_no_estimate_says_why(level, change, reason) -> None:  # type: ignore[no-untyped-def]
    trajectory = change(simulated())
    found = one(trajectory, level)
    assert found["reason"] == reason
    assert found[[*ESTIMATES, *BOUNDS, "p_value"]].isna().all()
    assert (found["n"], found["cells"], found["runs"], found["layers"]) == (0, 0, 0, 0)
    assert found["dropped"] == len(trajectory)


@pytest.mark.parametrize("interval", ["bootstrap", "jackknife"])
def test_three_layers_have_an_estimate_but_no_interval(interval: str) -> None:
    found = one(simulated(layers=3), interval=interval)
    assert np.isfinite(found[ESTIMATES].astype(float)).all()
    assert found[BOUNDS].isna().all()
    assert found["reason"] == "an interval needs at least 4 layers (there are 3)"
    assert np.isfinite(found["p_value"])


def test_one_layer_of_many_heads_has_an_estimate_only() -> None:
    found = one(simulated(layers=1, heads=5))
    assert np.isfinite(found["pearson"])
    assert np.isnan(found["p_value"])
    assert found["reason"] == (
        "an interval needs at least 4 layers (there are 1); a p-value needs at least 2 layers"
    )
    assert np.isnan(one(simulated(layers=1), "units")["p_value"])


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


def test_an_empty_trajectory_gives_an_empty_table_with_every_column() -> None:
    filled = coupling(simulated(), permutations=9)
    empty = coupling(simulated().head(0))
    assert empty.empty
    assert list(empty.columns) == list(filled.columns)
    assert list(filled.columns) == [
        *["method", "role", "level", "signed", "n", "cells", "runs", "layers", "dropped"],
        *["pearson", "pearson_low", "pearson_high", "spearman", "spearman_low", "spearman_high"],
        *["slope", "slope_low", "slope_high", "p_value", "reason"],
    ]


def test_wrong_input_is_named_in_one_sentence() -> None:
    trajectory = simulated()
    with pytest.raises(ValueError, match=r"lacks what is needed here: site, delta_direction\.$"):
        coupling(trajectory.drop(columns=["site", "delta_direction"]))
    with pytest.raises(ValueError, match="lacks what is needed here: units"):
        coupling(trajectory.drop(columns="units"), level="units")
    with pytest.raises(ValueError, match=r"same point \(run run0, step 10, site layers.0.query\)"):
        coupling(pd.concat([trajectory, trajectory]))
    with pytest.raises(ValueError, match=r"level must be one of pooled, .* got 'layer'"):
        coupling(trajectory, level="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="interval must be one of bootstrap, jackknife"):
        coupling(trajectory, interval="bca")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1; got 95"):
        coupling(trajectory, confidence=95)
    with pytest.raises(ValueError, match="by must name"):
        coupling(trajectory, by=())
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        coupling(trajectory, resamples=0)
    with pytest.raises(InputError, match="column 'delta_direction' must hold numbers: could not"):
        coupling(trajectory.assign(delta_direction="small"))
    with pytest.raises(InputError, match="column 'step' must hold numbers"):
        select_checkpoints(trajectory.assign(step="last"))


def chosen_steps(steps: list[int], **options: object) -> list[int]:
    table = pd.DataFrame({"run": "a", "step": steps})
    return select_checkpoints(table, **options)["step"].tolist()  # type: ignore[arg-type]


def test_checkpoints_are_spread_over_the_asked_part_of_the_run() -> None:
    steps = list(range(0, 1001, 25))
    assert chosen_steps(steps) == [625, 750, 875, 1000]
    assert chosen_steps(steps, kind="even") == [250, 500, 750, 1000]
    assert chosen_steps(steps, kind="early") == [125, 250, 375, 500]
    assert chosen_steps(steps, count=1) == [1000]


def test_checkpoints_are_never_step_zero_nor_taken_twice() -> None:
    assert chosen_steps([0, 1, 100], kind="early") == [1, 100]
    assert chosen_steps([0, 10, 900, 950, 1000]) == [10, 900, 950, 1000]
    assert chosen_steps([0, 990, 1000], count=2) == [990, 1000]
    assert chosen_steps([0]) == []


def test_checkpoints_are_chosen_per_run_and_keep_all_rows_in_order() -> None:
    table = pd.DataFrame(
        {
            "run": [*"aaaa", *"bbbb"],
            "step": [100, 100, 50, 20, 8, 4, 8, 2],
            "site": list("pqpqpqpq"),
        }
    )
    kept = select_checkpoints(table, count=1)
    pd.testing.assert_frame_equal(kept, table.loc[[0, 1, 4, 6]])


def test_checkpoints_refuse_wrong_input() -> None:
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        chosen_steps([1, 2], count=0)
    with pytest.raises(ValueError, match="kind must be one of late, even, early; got 'mid'"):
        chosen_steps([1, 2], kind="mid")
    with pytest.raises(ValueError, match="lacks what is needed here: run"):
        select_checkpoints(pd.DataFrame({"step": [1]}))


@pytest.mark.parametrize("level", ["within_step", "within_layer", "units"])
def test_categories_and_any_index_give_the_same_numbers(level: Level) -> None:
    plain = simulated(layers=4, steps=3)
    words = dict.fromkeys(["run", "method", "role", "site", "stack"], "category")
    table = plain.astype(words).astype({"layer": "Int64", "delta_magnitude": "Float64"})
    table.index = pd.MultiIndex.from_arrays([table["run"], table["step"]])
    options = {"level": level, "permutations": 20, "resamples": 50}
    found = coupling(table, by=["method", "role"], **options)  # type: ignore[arg-type]
    expected = coupling(plain, by=["method", "role"], **options)  # type: ignore[arg-type]
    assert isinstance(found["role"].dtype, pd.CategoricalDtype)
    pd.testing.assert_frame_equal(found.astype({"method": str, "role": str}), expected)
