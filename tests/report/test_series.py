from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dora_dynamics.report import packing
from dora_dynamics.report.recorded import read
from dora_dynamics.report.series import MEASURES, lay_out
from tests.report.report_runs import make_run
from tests.report.unpacking import unpack

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (300,)])
def test_packing_loses_no_bit(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=shape).astype(np.float32)
    numbers.ravel()[:1] = np.nan
    np.testing.assert_array_equal(unpack(packing.floats(numbers)), numbers.ravel())
    whole = rng.integers(-(2**31), 2**31, size=shape)
    np.testing.assert_array_equal(unpack(packing.integers(whole)), whole.ravel())


def test_what_float32_cannot_hold_becomes_infinite() -> None:
    assert unpack(packing.floats([1e300])).tolist() == [np.inf]


def test_long_runs_lose_steps_but_not_their_checkpoints(tmp_path: Path) -> None:
    recorded = read(make_run(tmp_path / "ft", layers=4, steps=range(0, 1010, 10)))
    most = len(recorded.table) * len(MEASURES) // 5
    [series] = lay_out(recorded, most)
    assert series.recorded == 101
    assert 20 <= len(series.steps) <= 25
    assert series.steps[0] == 0
    assert series.steps[-1] == 1000
    late = sorted(recorded.late["step"].unique())
    assert series.steps[series.checkpoints].tolist() == late
    for name, matrix in series.values.items():
        rows = recorded.table[recorded.table["step"].isin(series.steps)]
        wide = rows.pivot(index=["site", "role"], columns="step", values=name)
        keys = series.keys.set_index(["site", "role"]).index
        np.testing.assert_array_equal(matrix, wide.loc[keys].to_numpy(np.float32))


def test_a_step_that_was_cut_short_leaves_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ft", steps=(0, 10, 20))
    file = run / "trajectory.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    [series] = lay_out(read(run))
    for matrix in series.values.values():
        assert np.isnan(matrix).sum() == 3
        assert np.isnan(matrix[-3:, -1]).all()
