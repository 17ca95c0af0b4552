"""Coupling against explicit loops, the paper's points, simulated truth; everything undefined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dora_dynamics
from dora_dynamics.errors import InputError
from dora_dynamics.statistics import Level, coupling, select_checkpoints
from tests.simulated import BOUNDS, CELLS, ESTIMATES, UNIT_COLUMNS, by_loop, one, simulated

PAPER = Path(dora_dynamics.__file__).parent / "data" / "paper_figures_2_and_5.csv"


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


def test_slopes_of_units_beyond_floating_point_have_a_reason() -> None:
    trajectory = simulated(layers=6)
    found = one(trajectory.assign(unit_slope=1.7e308), "units")
    assert found[["slope", "slope_low", "slope_high"]].isna().all()
    assert "no finite values of the slope inside matrices" in found["reason"]
    assert found["pearson"] == one(trajectory, "units")["pearson"]


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


def test_one_layer_of_many_heads_has_an_estimate_only() -> None:
    found = one(simulated(layers=1, heads=5))
    assert np.isfinite(found["pearson"])
    assert np.isnan(found["p_value"])
    assert found["reason"] == (
        "an interval needs at least 4 layers (there are 1); a p-value needs at least 2 layers"
    )
    assert np.isnan(one(simulated(layers=1), "units")["p_value"])


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
