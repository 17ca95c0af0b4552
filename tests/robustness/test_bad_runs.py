"""Run directories from strangers, through every command: refused, or read for what they hold."""

from __future__ import annotations

import json
import random
import re
import shutil
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

from dora_dynamics.diagnosis import diagnose
from dora_dynamics.statistics import select_checkpoints
from tests.conftest import IS_CAMPAIGN, campaign
from tests.report.report_runs import make_run
from tests.report.unpacking import unpack
from tests.robustness.bad_files import (
    answer,
    damaged,
    misplaced,
    other_json,
    other_table,
    renamed_run,
    told_by,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pandas as pd

pytestmark = pytest.mark.filterwarnings("ignore")

UNITS = "units/step-3.safetensors"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return make_run(
        tmp_path / "good" / "run", layers=4, roles=("query",), steps=(0, 1, 2, 3), keep_units=3
    )


def treated(run: Path, rng: random.Random) -> None:
    """One thing is done to a good run."""
    kind = rng.randrange(10)
    if kind < 2:
        file = run / rng.choice(("run.json", "trajectory.csv", "trajectory.csv", UNITS))
        file.write_bytes(damaged(file.read_bytes(), rng))
    elif kind < 4:
        file = run / "run.json"
        file.write_bytes(other_json(file.read_bytes(), rng))
    elif kind < 7:
        file = run / "trajectory.csv"
        file.write_bytes(other_table(file.read_bytes(), rng))
    elif kind < 9:
        renamed_run(run, rng)
    else:
        misplaced(run / rng.choice(("run.json", "trajectory.csv", UNITS)), rng)


def described(run: Path, rows: pd.DataFrame, _: Path) -> bool:
    done = answer("runs", run, "--json")
    if done is None:
        return False
    (found,) = json.loads(done)
    assert found["rows"] == len(rows)
    assert found["steps"] == sorted(set(rows["step"]))
    assert found["non_finite_rows"] == (rows["non_finite"] > 0).sum()
    return True


def correlated(run: Path, rows: pd.DataFrame, _: Path) -> bool:
    done = answer(
        "coupling", run, "--level", "pooled", "--checkpoints", "all", "--by", "method", "--json"
    )
    if done is None:
        return False
    for found in json.loads(done):
        mine = rows[(rows["method"] == found["method"]) & (rows["step"] > 0)]
        x, y = mine["delta_direction"].to_numpy(), mine["delta_magnitude"].to_numpy()
        there = np.isfinite(x) & np.isfinite(y)
        assert found["n"] == there.sum()
        if found["pearson"] is not None:
            wanted = scipy.stats.pearsonr(x[there], y[there]).statistic
            assert found["pearson"] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    return True


def diagnosed(run: Path, rows: pd.DataFrame, _: Path) -> bool:
    """The same as from the table itself, read by other means."""
    done = answer("diagnose", run, "--alone", "--json")
    if done is None:
        return False
    found, wanted = json.loads(done), diagnose(rows, None)
    assert found["verdict"] == wanted.verdict
    assert found["layers"] == wanted.layers
    assert tuple(found["steps"]) == wanted.steps
    for mine, other in zip(found["table"], wanted.table.to_dict("records"), strict=True):
        value = np.nan if mine["value"] is None else mine["value"]
        assert value == pytest.approx(other["value"], rel=1e-9, nan_ok=True)
    return True


def drawn(run: Path, rows: pd.DataFrame, out: Path) -> bool:
    """Every finite row of the late checkpoints is a point, at its place."""
    shown: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *arguments: Any, **options: Any) -> None:
        shown.append(figure)
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", kept)
        if answer("plot", run, "--out", out / "figure.svg") is None:
            return False
    text = (out / "figure.svg").read_text(encoding="utf-8")
    assert not re.search(r"<xss|[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
    late = select_checkpoints(rows, count=4, kind="late")
    wanted = late[["delta_direction", "delta_magnitude"]].to_numpy(dtype=np.float64)
    wanted = wanted[np.isfinite(wanted).all(1)]
    parts = [part for axes in shown[0].axes for part in axes.collections]
    points = np.concatenate([np.asarray(part.get_offsets()) for part in parts])
    np.testing.assert_array_equal(sorted(points.tolist()), sorted(wanted.tolist()))
    return True


class Page(HTMLParser):
    """The elements of a page, and the JSON it works with."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.data: dict[str, Any] = {}
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._inside = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, text: str) -> None:
        if self._inside and "measures" in text:
            self.data = json.loads(text)
        self._inside = False


def reported(run: Path, rows: pd.DataFrame, out: Path) -> bool:
    """The page holds the numbers of the table, and no element or attribute from a name."""
    if answer("report", run, "--out", out / "page.html") is None:
        return False
    page = Page()
    page.feed((out / "page.html").read_text(encoding="utf-8"))
    assert "xss" not in page.elements
    assert not {name for name in page.attributes if name.startswith("on")}
    for name in ("delta_magnitude", "delta_direction", "signed_delta_magnitude", "radial_share"):
        found = np.sort(unpack(page.data["measures"][name]["values"]))
        wanted = np.sort(rows[name].to_numpy(dtype=np.float64).astype(np.float32))
        found, wanted = found[~np.isnan(found)], wanted[~np.isnan(wanted)]
        np.testing.assert_array_equal(found, wanted)
    return True


COMMANDS: dict[str, tuple[Callable[[Path, pd.DataFrame, Path], bool], int, int]] = {
    "runs": (described, 12, 300),
    "coupling": (correlated, 4, 120),
    "diagnose": (diagnosed, 4, 100),
    "plot": (drawn, 4, 80),
    "report": (reported, 4, 80),
}
"""What asks a command and checks its answer; how often by default, and in full."""


@pytest.mark.campaign
@pytest.mark.parametrize("command", COMMANDS)
def test_generated_bad_runs(command: str, tmp_path: Path, good: Path) -> None:
    if command == "report":
        pytest.importorskip("bokeh")
    ask, few, many = COMMANDS[command]
    rng = random.Random(command)
    answered = 0
    for number in range(campaign(few, many)):
        run = tmp_path / "bad" / str(number) / "run"
        shutil.copytree(good, run)
        treated(run, rng)
        told = told_by(run / "trajectory.csv")
        if told is None:  # no table to anybody, so that no answer can be right
            assert answer("runs", run) is None, f"{command}, try {number}: {run}"
        else:
            try:
                answered += ask(run, told, tmp_path)
            except Exception as error:
                raise AssertionError(f"{command}, try {number}: {run}") from error
        shutil.rmtree(run.parent)
    assert answered < campaign(few, many)
    assert answered or not IS_CAMPAIGN


@pytest.mark.parametrize("kind", ["magnitude_direction", "coupling"])
def test_names_are_no_formulas_in_figures(kind: str, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", "$\\frac{$", run="$x$", layers=4, roles=("a$b\x1b<xss>",), steps=(0, 1, 2)
    )
    assert answer("plot", run, "--kind", kind, "--out", tmp_path / "a.svg") is not None
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "$\\frac{$" in text
    assert "a$b\\x1b&lt;xss&gt;" in text
