"""What holds for every weight and every run, over generated ones."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dora_dynamics as dd
from dora_dynamics.decomposition import UnitChange
from dora_dynamics.runs.directory import RunInfo, append_rows, create_run, write_info
from dora_dynamics.trajectory import to_table
from dora_dynamics.units.arithmetic import MEASURES
from tests.conftest import campaign
from tests.runs.test_directory import rows
from tests.simulated import simulated

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))
SEEDS = st.integers(0, 2**31)
RELATIVE = st.sampled_from([5.0, 0.3, 1e-3, 1e-6])
EXAMPLES = settings(max_examples=40, deadline=None)


def pair(shape: tuple[int, int], seed: int, relative: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator, dtype=torch.float64)
    return before, before + relative * torch.randn(shape, generator=generator, dtype=torch.float64)


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, relative=RELATIVE, scale=st.floats(1e-6, 1e6))
def test_direction_knows_no_scale_and_magnitude_is_linear_in_it(
    shape: tuple[int, int], seed: int, relative: float, scale: float
) -> None:
    before, after = pair(shape, seed, relative)
    plain, scaled = dd.weight_change(before, after), dd.weight_change(scale * before, scale * after)
    assert 0 <= plain.delta_direction <= 2
    tolerance = 1e-12 + 1e-14 / relative  # the products are rounded before they are subtracted
    assert scaled.delta_direction == pytest.approx(plain.delta_direction, rel=4 * tolerance)
    assert scaled.delta_magnitude == pytest.approx(scale * plain.delta_magnitude, rel=tolerance)
    assert scaled.relative_delta_magnitude == pytest.approx(
        plain.relative_delta_magnitude, rel=tolerance
    )


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, relative=RELATIVE)
def test_transposing_is_changing_the_axis(
    shape: tuple[int, int], seed: int, relative: float
) -> None:
    before, after = pair(shape, seed, relative)
    one, other = dd.weight_change(before.T, after.T), dd.weight_change(before, after, axis="input")
    for field in fields(UnitChange):
        np.testing.assert_allclose(
            getattr(one.units, field.name), getattr(other.units, field.name), rtol=1e-9, atol=1e-300
        )


@EXAMPLES
@given(shape=SHAPES, seed=SEEDS, relative=RELATIVE)
def test_permuting_units_permutes_their_changes_and_no_measure(
    shape: tuple[int, int], seed: int, relative: float
) -> None:
    before, after = pair(shape, seed, relative)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    plain, mixed = dd.weight_change(before, after), dd.weight_change(before[order], after[order])
    np.testing.assert_allclose(
        mixed.units.one_minus_cosine, plain.units.one_minus_cosine[order.numpy()], rtol=1e-9
    )
    for name in MEASURES:
        assert getattr(mixed, name) == pytest.approx(
            getattr(plain, name), rel=1e-9, abs=1e-300, nan_ok=True
        ), name


@settings(max_examples=20, deadline=None)
@given(
    shape=SHAPES,
    seed=SEEDS,
    rank=st.integers(1, 3),
    size=st.sampled_from([1.0, 1e-3]),
    dora=st.booleans(),
)
def test_merging_then_measuring_is_measuring(
    shape: tuple[int, int], seed: int, rank: int, size: float, dora: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"query": nn.Linear(shape[1], shape[0], bias=False).double()})
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model["query"].weight.copy_(weight)  # type: ignore[operator]
    recorder = dd.Recorder(model, ["query"], method="x")
    (dd.apply_dora if dora else dd.apply_lora)(model, ["query"], rank=rank, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(size * noise)
    recorder.step = 1
    recorder.record()
    dd.merge(model)
    merged = dd.weight_change(weight, model["query"].weight.detach())  # type: ignore[operator]
    row = recorder.trajectory.iloc[-1]
    for name in ("delta_magnitude", "delta_direction", "update_norm", "signed_delta_magnitude"):
        expected = getattr(merged, name)
        assert row[name] == pytest.approx(expected, rel=1e-6, abs=1e-14), name


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, steps=st.integers(1, 12), parts=st.integers(2, 4))
def test_a_trajectory_in_parts_is_the_whole(seed: int, steps: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    content = rows("run", steps)
    for row in content:
        row["delta_magnitude"] = float(np.exp(rng.normal(0, 50)))
        row["unit_coupling"] = float(rng.uniform(-1, 1)) if rng.random() < 0.8 else float("nan")
    info = RunInfo("run", "FT", "output", ["query"], ["layers.1.query"], "given", "Tiny")
    place = np.sort(rng.integers(0, parts, steps))
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for part in range(parts):
            path = create_run(Path(folder) / str(part))
            write_info(path, info)
            append_rows(path, [row for row, of in zip(content, place, strict=True) if of == part])
            paths.append(path)
        table = dd.load_runs(paths).drop(columns="run")
    whole = to_table(content).drop(columns="run")
    pd.testing.assert_frame_equal(table, whole, check_exact=True)


@pytest.mark.campaign
@settings(max_examples=campaign(1, 5), deadline=None)
@given(
    rho=st.floats(-0.9, 0.9),
    confidence=st.sampled_from([0.8, 0.95]),
    layers=st.integers(6, 12),
    runs=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_bootstrap_intervals_cover_the_truth_at_their_stated_rate(
    rho: float, confidence: float, layers: int, runs: int, seed: int
) -> None:
    """Of studies simulated with a known correlation, that share of intervals holds it."""
    draws = campaign(60, 200)
    studies = pd.concat(
        simulated(runs=runs, layers=layers, rho=rho, seed=seed + i).assign(method=i)
        for i in range(draws)
    )
    found = dd.coupling(studies, "method", confidence=confidence, resamples=200, permutations=0)
    chance = 4 * np.sqrt(confidence * (1 - confidence) / draws)
    for name, truth in (("pearson", rho), ("slope", rho)):
        covered = (found[f"{name}_low"] <= truth) & (found[f"{name}_high"] >= truth)
        assert abs(covered.mean() - confidence) < 0.05 + chance, (name, covered.mean())
