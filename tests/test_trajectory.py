"""The table: every column there and of its type, and what is none is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import dora_dynamics as dd
from dora_dynamics.sites import Site
from dora_dynamics.trajectory import (
    COLUMN_NAMES,
    COLUMNS,
    TrajectoryError,
    to_table,
    trajectory_row,
    validate,
)

SITE = Site("encoder.layers.3.q_proj", 3, "encoder", "query")


def weights(rows: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(rows, 9, generator=generator, dtype=torch.float64)
    return before, before + 0.2 * torch.randn(rows, 9, generator=generator, dtype=torch.float64)


def row(before: torch.Tensor, after: torch.Tensor, **options: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"run": "r", "method": "FT", "step": 2}
    return trajectory_row(SITE, dd.weight_change(before, after), **(known | options))


class TestRow:
    def test_holds_every_column_and_what_it_names(self) -> None:
        before, after = weights()
        values = row(before, after, total_decay=0.25, head=7)
        assert tuple(values) == COLUMN_NAMES
        W0, W = before.numpy(), after.numpy()
        m0, m = np.linalg.norm(W0, axis=1), np.linalg.norm(W, axis=1)
        turned = 1 - (W0 * W).sum(1) / (m0 * m)
        radial = ((W - W0) * W0).sum(1) / m0
        expected: dict[str, Any] = {
            "step": 2,
            "site": "encoder.layers.3.q_proj",
            "layer": 3,
            "stack": "encoder",
            "role": "query",
            "head": 7,
            "units": 40,
            "delta_magnitude": np.abs(m - m0).mean(),
            "delta_direction": turned.mean(),
            "signed_delta_magnitude": (m - m0).mean(),
            "relative_delta_magnitude": (np.abs(m - m0) / m0).mean(),
            "magnitude_before": m0.mean(),
            "update_norm": np.linalg.norm(W - W0),
            "unit_coupling": stats.pearsonr(turned, np.abs(m - m0)).statistic,
            "unit_rank_coupling": stats.spearmanr(turned, np.abs(m - m0)).statistic,
            "unit_slope": stats.linregress(turned, np.abs(m - m0)).slope,
            "signed_unit_coupling": stats.pearsonr(turned, m - m0).statistic,
            "signed_unit_rank_coupling": stats.spearmanr(turned, m - m0).statistic,
            "signed_unit_slope": stats.linregress(turned, m - m0).slope,
            "radial_share": (radial**2).sum() / ((W - W0) ** 2).sum(),
            "total_decay": 0.25,
            "zero_units": 0,
            "non_finite": 0,
        }
        for name, value in expected.items():
            compared = value if isinstance(value, str) else pytest.approx(value, rel=1e-10)
            assert values[name] == compared, name

    def test_zero_units_stay_out_of_the_coupling(self) -> None:
        before, after = weights()
        without = row(before[2:], after[2:])
        before[0], after[1] = 0, 0
        values = row(before, after)
        assert values["zero_units"] == 2
        for name in ("unit_coupling", "unit_rank_coupling", "unit_slope", "delta_direction"):
            assert values[name] == pytest.approx(without[name], rel=1e-12)

    def test_non_finite_units_leave_no_number(self) -> None:
        before, after = weights()
        after[4, 2] = np.nan
        values = row(before, after)
        assert values["non_finite"] == 1
        measures = [c.name for c in COLUMNS if c.kind == "number" and c.name != "total_decay"]
        assert [name for name in measures if not np.isnan(values[name])] == []

    def test_nothing_changed(self) -> None:
        before, _ = weights()
        values = row(before, before.clone())
        assert values["delta_magnitude"] == values["delta_direction"] == 0
        assert np.isnan(values["unit_coupling"])
        assert np.isnan(values["radial_share"])


class TestTable:
    def test_types(self) -> None:
        table = to_table([row(*weights(seed=s), step=s) for s in range(3)])
        kinds = {"text": ("str", "object"), "integer": ("int64", "Int64"), "number": ("float64",)}
        for column in COLUMNS:
            assert str(table[column.name].dtype) in kinds[column.kind], column.name
        assert table["head"].isna().all()
        assert table["step"].tolist() == [0, 1, 2]
        empty = to_table([])
        assert empty.dtypes.to_dict() == table.dtypes.to_dict()

    def test_extra_columns_follow(self) -> None:
        table = to_table([row(*weights())])
        table.insert(0, "mine", [5])
        assert list(validate(table).columns) == [*COLUMN_NAMES, "mine"]

    def test_validation_copies(self) -> None:
        table = to_table([row(*weights())])
        copied = validate(table)
        copied.loc[0, "step"] = 99
        assert table.loc[0, "step"] == 2

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("step", 0.5, r"column 'step' must hold whole numbers: 0\.5 is none"),
            ("step", None, r"column 'step' must hold whole numbers"),
            ("units", "many", r"column 'units' must hold whole numbers: .*many"),
            ("layer", 1.25, r"column 'layer' must hold whole numbers: 1\.25 is none"),
            ("delta_direction", "x", r"column 'delta_direction' must hold numbers: .*x"),
        ],
    )
    def test_wrong_values_are_refused(self, column: str, value: Any, message: str) -> None:
        table = to_table([row(*weights()), row(*weights())]).astype({column: object})
        table.loc[1, column] = value
        table.index = pd.Index([3, 3])  # as after a concatenation
        with pytest.raises(TrajectoryError, match=message):
            validate(table)

    def test_missing_and_repeated_columns_are_named(self) -> None:
        table = to_table([row(*weights())])
        with pytest.raises(TrajectoryError, match=r"lacks the column\(s\) step, role\."):
            validate(table.drop(columns=["step", "role"]))
        with pytest.raises(TrajectoryError, match=r"has the column\(s\) step more than once"):
            validate(pd.concat([table, table[["step"]]], axis=1))

    def test_missing_values_stay_missing(self) -> None:
        table = to_table([row(*weights()) | {"layer": None, "stack": None}])
        assert table["layer"].isna().all()
        assert table["stack"].tolist() == [""]
