"""Diagnosis: its parts against independent computations, its verdicts on runs of known kind."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import dora_dynamics as dd
from analyses.diagnosis_simulation import RIGHT
from analyses.synthetic_runs import KINDS, Design, Kind, pretrained, study
from dora_dynamics.diagnosis.effective_rank import change_of, effective_rank
from dora_dynamics.diagnosis.measures import BY_NAME, row_measures
from dora_dynamics.effective import Dense, LowRank
from dora_dynamics.errors import InputError
from dora_dynamics.sites import Site
from tests.diagnosis.kinds import diagnose, runs_of


class TestVerdict:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("numbers", [(0,), (0, 1)])
    def test_a_method_of_known_kind_alone(
        self, tables: dict[Kind, pd.DataFrame], kind: Kind, numbers: tuple[int, ...]
    ) -> None:
        found = diagnose(runs_of(tables[kind], *numbers), reference=None)
        assert found.verdict in RIGHT[kind]
        assert {s.mechanism for s in found.statements if s.holds} <= {kind}
        assert (found.layers, found.runs, found.steps) == (6, len(numbers), (62, 75, 88, 100))
        assert found.placement is None

    @pytest.mark.parametrize("kind", KINDS)
    def test_against_references_of_the_same_weights(
        self, tables: dict[Kind, pd.DataFrame], references: pd.DataFrame, kind: Kind
    ) -> None:
        found = diagnose(runs_of(tables[kind], 0, 1), references)
        assert found.verdict in RIGHT[kind]
        assert found.placement is not None
        if kind == "turning":
            assert found.placement.differs["LoRA"] == ()
            assert abs(found.placement.position) < 0.5
        if kind == "own magnitude":
            assert found.placement.differs["FT"] == ()
            assert abs(found.placement.position - 1) < 0.5
        if kind in ("decay", "noise"):
            assert found.placement.differs["LoRA"]
            assert found.placement.differs["FT"]

    def test_decay_says_to_run_without(self, tables: dict[Kind, pd.DataFrame]) -> None:
        found = diagnose(tables["decay"], reference=None)
        assert found.confidence == "high"
        assert any("weight decay 0" in tip for tip in found.advice)
        said = str(found)
        assert said.startswith("decay: decay (ΔM is the work of weight decay")
        assert "Λ = 0.05 takes 4.9% off a weight" in " ".join(said.split())

    def test_decay_that_is_not_known_is_not_decided(self, tables: dict[Kind, pd.DataFrame]) -> None:
        unknown = tables["decay"].assign(total_decay=np.nan)
        found = diagnose(unknown, reference=None)
        assert found.verdict == "undecided"
        assert any("Λ is not known" in tip for tip in found.advice)
        grown = diagnose(tables["turning"].assign(total_decay=np.nan), reference=None)
        assert grown.verdict == "LoRA-like"

    def test_one_run_of_each_calls_no_difference(
        self, tables: dict[Kind, pd.DataFrame], references: pd.DataFrame
    ) -> None:
        single = references[references["run"].str.endswith("2")]
        found = diagnose(runs_of(tables["turning"], 0), single)
        assert found.placement is not None
        assert set(found.placement.differs.values()) == {None}
        assert "LoRA differs" not in found.table
        assert any("one run" in tip for tip in found.advice)

    def test_the_order_of_rows_does_not_matter(
        self, tables: dict[Kind, pd.DataFrame], references: pd.DataFrame
    ) -> None:
        own = runs_of(tables["turning"], 0, 1)
        first = diagnose(own, references)
        second = diagnose(own.sample(frac=1, random_state=1), references)
        pd.testing.assert_frame_equal(
            first.table[["value", "LoRA", "FT"]], second.table[["value", "LoRA", "FT"]]
        )
        assert first.verdict == second.verdict

    def test_other_methods_of_the_table_are_references(
        self, tables: dict[Kind, pd.DataFrame], references: pd.DataFrame
    ) -> None:
        together = pd.concat([runs_of(tables["noise"], 0, 1), references])
        found = diagnose(together, method="noise")
        assert {"LoRA", "FT"} <= set(found.table.columns)
        assert not any("MiniLM" in note for note in found.warnings)
        with pytest.raises(InputError, match="holds 3 methods"):
            diagnose(together)
        with pytest.raises(InputError, match="no rows of method 'mine'"):
            diagnose(together, method="mine")

    def test_the_recorded_runs_are_for_a_first_look(self, tables: dict[Kind, pd.DataFrame]) -> None:
        found = diagnose(tables["turning"])
        alone = diagnose(tables["turning"], reference=None)
        assert found.verdict == alone.verdict  # a recipe of others does not decide
        assert any("differ from yours" in note for note in found.warnings)
        assert {"FT", "LoRA", "DoRA"} <= set(found.table.columns)
        named = diagnose(tables["turning"].assign(method="LoRA"))
        assert named.warnings == found.warnings


class TestNotEnough:
    def test_few_layers(self, tables: dict[Kind, pd.DataFrame]) -> None:
        found = diagnose(tables["turning"].query("layer < 3"), reference=None)
        assert (found.verdict, found.confidence) == ("not enough data", "none")
        assert "there are 3; 4 are needed" in str(found)
        assert found.table.empty

    def test_only_the_start(self, tables: dict[Kind, pd.DataFrame]) -> None:
        found = diagnose(tables["turning"].query("step == 62").assign(step=0))
        assert found.verdict == "not enough data"
        assert "no rows after step 0" in str(found)

    def test_nothing_moved(self, tables: dict[Kind, pd.DataFrame]) -> None:
        still = tables["turning"].assign(delta_magnitude=0.0, delta_direction=0.0)
        assert diagnose(still).verdict == "not enough data"

    def test_rows_that_are_not_finite_are_left_out_and_said(
        self, tables: dict[Kind, pd.DataFrame]
    ) -> None:
        broken = tables["turning"].copy()
        broken.loc[broken.index[:5], ["delta_magnitude", "delta_direction"]] = np.nan
        found = diagnose(broken, reference=None)
        assert found.verdict == "LoRA-like"
        assert any(note.startswith("5 rows are left out") for note in found.warnings)

    def test_bad_input_is_one_sentence(self, tables: dict[Kind, pd.DataFrame]) -> None:
        table = tables["turning"]
        with pytest.raises(InputError, match=r"lacks the column\(s\) radial_share"):
            diagnose(table.drop(columns="radial_share"))
        with pytest.raises(InputError, match="same point"):
            diagnose(pd.concat([table, table]))
        with pytest.raises(InputError, match="no rows"):
            diagnose(table.iloc[:0])
        with pytest.raises(InputError, match="error_level"):
            diagnose(table, error_level=0.7)
        with pytest.raises(InputError, match="resamples"):
            diagnose(table, resamples=3)

    def test_references_of_other_roles_are_not_compared(
        self, tables: dict[Kind, pd.DataFrame], references: pd.DataFrame
    ) -> None:
        elsewhere = references.assign(role="gate")
        found = diagnose(runs_of(tables["turning"], 0), elsewhere)
        assert any("no weight of role query, value" in note for note in found.warnings)
        half = references[references["role"] == "query"]
        partly = diagnose(runs_of(tables["turning"], 0, 1), half)
        assert any("by query only" in note for note in partly.warnings)
        assert partly.verdict == "LoRA-like"


class TestEvidence:
    def test_levels_are_those_of_coupling(self, tables: dict[Kind, pd.DataFrame]) -> None:
        table = tables["own magnitude"].query("role == 'query'")
        found = diagnose(table, reference=None).table.set_index("measure")
        for level in ("pooled", "within_step", "units"):
            expected = dd.coupling(table, by="method", level=level, permutations=0).iloc[0]
            assert found.loc[f"r {level}", "value"] == pytest.approx(expected["pearson"], abs=1e-9)
        slope = dd.coupling(table, by="method", permutations=0)["slope"].iloc[0]
        scaled = slope / table["magnitude_before"].mean()
        assert found.loc["slope within_step", "value"] == pytest.approx(scaled, rel=1e-6)

    def test_shares_are_what_they_say(self) -> None:
        rng = np.random.default_rng(0)
        weights = pretrained(1, rng)
        shrunk = study(Design("decay", 1e-9, total_decay=0.3), weights, 1, rng)
        measured = {name: values.mean() for name, values in row_measures(shrunk).items()}
        assert measured["decay share"] == pytest.approx(1, rel=1e-6)
        assert measured["decay fit"] == pytest.approx(1, rel=1e-6)
        assert measured["own radial share"] == pytest.approx(0, abs=1e-6)
        turned = study(Design("turning", 0.2, orthogonal=True), weights, 1, rng)
        measured = {name: values.mean() for name, values in row_measures(turned).items()}
        assert measured["turning share"] == pytest.approx(1, rel=0.1)  # means of products
        assert measured["radial share"] < 1e-6
        assert measured["growth"] == pytest.approx(1, rel=1e-6)

    def test_scales_are_undone(self) -> None:
        values = np.array([-0.98, -0.2, 0.0, 0.7])
        for name in ("r units", "slope units", "radial share"):
            measure = BY_NAME[name]
            np.testing.assert_allclose(measure.restore(measure.transform(values)), values)

    def test_effective_rank_is_that_of_equal_singular_values(self) -> None:
        rng = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(9, 4, generator=rng, dtype=torch.float64))
        other, _ = torch.linalg.qr(torch.randn(7, 4, generator=rng, dtype=torch.float64))
        assert effective_rank(basis @ other.T) == pytest.approx(4)
        uneven = basis @ torch.diag(torch.tensor([1.0, 1.0, 0.0, 2.0]).double()) @ other.T
        entropy = stats.entropy([0.25, 0.25, 0.5])
        assert effective_rank(uneven) == pytest.approx(np.exp(entropy))
        assert np.isnan(effective_rank(torch.zeros(3, 2)))

    def test_the_change_of_factors_is_that_of_the_weight(self) -> None:
        rng = torch.Generator().manual_seed(1)
        W, A, B, m = (torch.randn(s, generator=rng) for s in ((6, 9), (2, 9), (6, 2), (6,)))
        site = Site("layers.0.query", 0, "", "query")
        turned = W.double() + 0.5 * (B.double() @ A.double())
        merged = m.double()[:, None] * turned / turned.norm(dim=1, keepdim=True)
        by_factors = change_of(site, W, LowRank(A, B, 0.5, m))
        torch.testing.assert_close(by_factors, change_of(site, W, Dense(merged)))
        torch.testing.assert_close(change_of(site, W, LowRank(A, B, 0.5)), turned - W.double())


def test_the_interval_of_the_mean_change_speaks_of_what_the_verb_says(
    tables: dict[Kind, pd.DataFrame],
) -> None:
    said = {}
    for sign, verb in ((1, "grow"), (-1, "shrink")):
        rows = tables["turning"].copy()
        magnitude = rows["delta_magnitude"] / rows["relative_delta_magnitude"]
        change = 0.01 * (rows["layer"] - 2) * sign  # not of one sign in all layers
        rows["signed_delta_magnitude"] = change * magnitude
        text = " ".join(str(diagnose(rows, reference=None)).split())
        found = re.search(rf"Magnitudes {verb} by (\S+)% on the mean \[(\S+)%, (\S+)%\]", text)
        assert found is not None
        said[verb] = [float(number.replace("−", "-")) for number in found.groups()]
    mean, low, high = said["grow"]
    assert low < 0 < mean < high
    assert high > 1.2 * abs(low)
    assert said["shrink"] == pytest.approx([mean, low, high], rel=0.1)


def test_a_reference_without_the_roles_is_named_as_the_reference(
    tables: dict[Kind, pd.DataFrame], references: pd.DataFrame
) -> None:
    said = " ".join(str(diagnose(tables["turning"].assign(role="elsewhere"), references)).split())
    for name in references["method"].unique():
        assert f"the reference's {name} has no weight of role elsewhere: not compared." in said


def test_nothing_depends_on_the_order_of_runs_and_rows(
    tables: dict[Kind, pd.DataFrame], references: pd.DataFrame
) -> None:
    own = runs_of(tables["turning"], 0, 1)
    found = diagnose(own, references)
    again = diagnose(own[::-1], references.sample(frac=1, random_state=0))
    assert str(again).splitlines()[:7] == str(found).splitlines()[:7]
    pd.testing.assert_frame_equal(again.table[found.table.columns], found.table, check_exact=True)


def test_a_copy_of_a_run_is_no_evidence(
    tables: dict[Kind, pd.DataFrame], references: pd.DataFrame
) -> None:
    once = runs_of(tables["own magnitude"], 0)
    twice = pd.concat([once, once.assign(run="a copy")])
    found = diagnose(twice, reference=None)
    assert found.runs == 1
    assert found.confidence != "high"
    assert "run own magnitude-seed0 holds the same numbers as a copy: counted once." in str(found)
    alone = diagnose(once.assign(run="a copy"), reference=None)
    pd.testing.assert_frame_equal(found.table, alone.table, check_exact=True)
    with_itself = diagnose(once, pd.concat([references, once]))
    assert set(with_itself.placement.differs if with_itself.placement else {}) == {"LoRA", "FT"}


def test_recorded_runs_without_the_roles_are_not_said_to_be_compared(
    tables: dict[Kind, pd.DataFrame],
) -> None:
    found = diagnose(tables["turning"].assign(role="elsewhere"))
    [note] = found.warnings
    assert note.startswith(
        "compared with nothing: the project's own runs follow query, value, and these elsewhere."
    )


def test_a_reference_without_a_usable_row_is_named(
    tables: dict[Kind, pd.DataFrame], references: pd.DataFrame
) -> None:
    lost = references.assign(
        delta_magnitude=references["delta_magnitude"].where(references["method"] != "FT")
    )
    found = diagnose(tables["turning"], lost)
    assert any(note.startswith("the reference's FT has no late checkpoint") for note in
               found.warnings)  # fmt: skip
    assert "FT" not in found.table
    assert "LoRA" in found.table


def test_what_is_not_defined_is_said_to_be(tables: dict[Kind, pd.DataFrame]) -> None:
    rows = tables["own magnitude"]
    apart = rows.assign(role=rows["role"] + rows["layer"].astype(str))  # a layer a role
    said = " ".join(str(diagnose(apart, reference=None)).split())
    assert "Across layers r is not defined; across the units inside a weight r = " in said
    assert "nan" not in said


def test_a_share_of_decay_beyond_the_largest_is_said_to_be(
    tables: dict[Kind, pd.DataFrame],
) -> None:
    found = diagnose(tables["own magnitude"].assign(total_decay=5.0), reference=None)
    assert "Weight decay alone would give twice ΔM or more." in found.found


def test_columns_of_text_are_refused(tables: dict[Kind, pd.DataFrame]) -> None:
    rows = tables["turning"].astype({"delta_magnitude": str})
    assert diagnose(rows, reference=None).verdict == "LoRA-like"  # numbers written as text
    with pytest.raises(InputError, match="'delta_magnitude' must hold numbers"):
        diagnose(rows.assign(delta_magnitude="much"), reference=None)


def test_an_overflowing_row_gives_no_warning(tables: dict[Kind, pd.DataFrame]) -> None:
    rows = tables["turning"].copy()
    last = rows.index[-1]
    rows.loc[last, ["delta_magnitude", "signed_delta_magnitude"]] = 1e300
    assert diagnose(rows, reference=None).verdict != "not enough data"
