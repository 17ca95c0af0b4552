"""Intervals and tests of the diagnosis against scipy, and its rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats

from dora_dynamics.diagnosis.inference import Inference, holm, infer, replicate
from dora_dynamics.diagnosis.readings import INDEX, Readings
from dora_dynamics.diagnosis.rules import Placement, decide
from tests.diagnosis.kinds import runs_of

if TYPE_CHECKING:
    import pandas as pd

    from analyses.synthetic_runs import Kind


class TestInference:
    def test_a_mean_over_layers_is_the_t_test(self, tables: dict[Kind, pd.DataFrame]) -> None:
        table = runs_of(tables["noise"], 0)
        k = INDEX["signed ΔM / ΔM"]
        found = replicate({"own": Readings.of(table)}, True, 4000, np.random.default_rng(0))
        read = infer(lambda estimates: estimates[0], [found["own"]])
        share = table["signed_delta_magnitude"] / table["delta_magnitude"]
        layers = share.groupby(table["layer"]).mean()
        expected = stats.ttest_1samp(layers, 0.0)
        assert read.freedom[k] == pytest.approx(5)
        assert read.error[k] >= stats.sem(layers) * (1 - 1e-9)
        assert read.error[k] == pytest.approx(stats.sem(layers), rel=0.15)
        p = 2 * min(read.above(0.0)[k], read.below(0.0)[k])
        assert p == pytest.approx(expected.pvalue, rel=0.3)

    def test_a_margin_makes_a_test_stricter(self) -> None:
        read = Inference(np.array([0.5]), np.array([0.2]), np.array([5.0]))
        two_sided = 2 * stats.t.sf(2.5, 5)
        assert read.beyond(0.0)[0] == pytest.approx(two_sided)
        assert read.beyond(0.1)[0] == pytest.approx(stats.t.sf(2.0, 5) + stats.t.sf(3.0, 5))

    def test_holm_against_its_definition(self) -> None:
        p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
        np.testing.assert_allclose(holm(p), [0.03, 0.06, np.nan, 0.06, 0.02])

    def test_shared_layers_cancel_and_runs_are_borrowed(
        self, tables: dict[Kind, pd.DataFrame]
    ) -> None:
        own, other = runs_of(tables["turning"], 0), runs_of(tables["turning"], 1, 2, 3)
        readings = {"a": Readings.of(own), "b": Readings.of(other)}
        k = INDEX["turning share"]
        errors = {}
        for shared in (True, False):
            found = replicate(readings, shared, 1000, np.random.default_rng(0))
            away = infer(lambda e: e[0] - e[1], [found["a"], found["b"]])
            errors[shared] = away.error[k]
            assert "runs of a" in found["a"].left_out
        assert errors[True] < 0.7 * errors[False]


class TestDecide:
    @pytest.mark.parametrize(
        ("mechanism", "lora", "ft", "interval", "expected"),
        [
            ("turning", ("x",), (), (0.9, 1.1), "FT-like"),
            ("none", (), ("x",), (-0.1, 0.1), "LoRA-like"),
            ("none", ("x",), ("y",), (0.2, 0.4), "neither"),
            ("turning", ("x",), ("y",), (0.2, 0.4), "LoRA-like"),
            ("turning", ("x",), ("y",), (0.4, 0.6), "between"),
            ("own magnitude", ("x",), ("y",), (0.7, 1.4), "FT-like"),
            ("own magnitude", ("x",), ("y",), (0.4, 1.4), "neither"),
            ("own magnitude", (), (), (0.4, 1.4), "FT-like"),
            ("none", (), (), (0.4, 1.4), "undecided"),
            ("decay", (), ("x",), (0.0, 0.1), "decay"),
        ],
    )
    def test_table(
        self,
        mechanism: str,
        lora: tuple[str, ...],
        ft: tuple[str, ...],
        interval: tuple[float, float],
        expected: str,
    ) -> None:
        placement = Placement(sum(interval) / 2, *interval, {"LoRA": lora, "FT": ft})
        assert decide(mechanism, placement, lora="LoRA", ft="FT", binding=True) == expected  # type: ignore[arg-type]
