from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import pytest

from dora_dynamics.report.cautions import cautions
from dora_dynamics.report.recorded import read
from tests.report.report_runs import make_run

if TYPE_CHECKING:
    from pathlib import Path


def told(*runs: Path) -> dict[str, str]:
    """What is warned of, and the words, notes left out."""
    return {c.about: c.text for c in cautions(read(runs)) if c.kind == "warning"}


def test_two_good_runs_give_no_warning(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"ft{seed}", seed=seed) for seed in (0, 1)]
    assert told(*runs) == {}
    assert {c.about for c in cautions(read(runs))} == {"axis", "baseline"}


def test_one_run_short_runs_and_few_layers(tmp_path: Path) -> None:
    found = told(make_run(tmp_path / "ft", layers=3, steps=(0, 1, 2)))
    assert "FT: one run each" in found["one run"]
    assert found["too few points"].startswith("Fewer than 4 recorded steps")
    kinds = [c.text for c in cautions(read(tmp_path / "ft")) if c.about == "too few points"]
    assert any("FT, query: 3" in text for text in kinds)


def test_copies_of_a_run_are_named(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, run=name, seed=3) for name in ("one", "two")]
    assert told(*runs)["copies"].startswith("one, two hold the same numbers.")
    other = make_run(tmp_path / "other", "LoRA", seed=3)  # of another method
    assert "copies" not in told(runs[0], other)


def test_the_input_axis(tmp_path: Path) -> None:
    assert "not comparable" in told(make_run(tmp_path / "ft", axis="input"))["axis"]


def test_different_baselines_and_quantised_ones(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", baseline="the checkpoint A")
    two = make_run(tmp_path / "two", baseline="the model's own weights are quantised (nf4)")
    found = told(one, two)
    assert "two was measured from quantised weights" in found["baseline"]
    texts = [c.text for c in cautions(read([one, two])) if c.about == "baseline"]
    assert any("2 different baselines: the checkpoint A, the model's" in text for text in texts)


@pytest.mark.parametrize(
    ("share", "warned"), [(1.0, True), (0.9, True), (0.3, False), (-1.0, False)]
)
def test_decay_that_accounts_for_the_magnitude(tmp_path: Path, share: float, warned: bool) -> None:
    run = make_run(tmp_path / "ft", total_decay=0.1)
    file = run / "trajectory.csv"
    table = pd.read_csv(file)
    shrunk = -table["magnitude_before"] * (1 - 2.718281828459045 ** -table["total_decay"])
    table["signed_delta_magnitude"] = share * shrunk
    table.to_csv(file, index=False)
    assert ("decay" in told(run)) == warned
    words = next(c.text for c in cautions(read(run)) if c.about == "decay")
    assert (f"{share:.0%}" if warned else f"{share:+.2f} times") in words
    assert "= 0.1" in words


def test_unknown_decay(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ft", total_decay=float("nan"))
    assert "not known for ft" in told(run)["decay"]


def test_non_finite_rows(tmp_path: Path) -> None:
    nothing = {"non_finite": 4, "delta_magnitude": None, "delta_direction": None}
    found = told(make_run(tmp_path / "ft", change=nothing))
    assert found["NaN or Inf"].startswith("ft: 1 rows hold NaN or Inf in the weights, from step 40")
    assert "encoder.5.value" in found["NaN or Inf"]


def test_empty_runs_different_lengths_and_cut_steps(tmp_path: Path) -> None:
    long, short = make_run(tmp_path / "long"), make_run(tmp_path / "short", steps=(0, 10))
    empty = make_run(tmp_path / "empty")
    (empty / "trajectory.csv").write_text(
        (empty / "trajectory.csv").read_text().split("\n")[0] + "\n"
    )
    file = short / "trajectory.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    found = told(long, short, empty)
    assert "long: 40, short: 10" in found["different lengths"]
    assert "holds no rows" in found["empty run"]
    assert found["incomplete steps"].startswith(
        "short: 1 steps lack some weights (the first is 10)"
    )
