"""Run directories from strangers: refused in one sentence, or read for exactly what they hold."""

from __future__ import annotations

import csv
import json
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from click.testing import CliRunner

import dora_dynamics as dd
from dora_dynamics.cli import main
from dora_dynamics.errors import InputError
from dora_dynamics.runs.directory import (
    append_rows,
    create_run,
    read_info,
    read_run,
)
from dora_dynamics.trajectory import COLUMNS
from tests.conftest import campaign
from tests.robustness.bad_files import damaged, soon, told_by
from tests.runs.test_directory import rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


@pytest.fixture
def run(
    tmp_path: Path, tiny_transformer: Callable[[], nn.Module], train: Callable[..., object]
) -> Path:
    """A good run with kept units, in a folder of its own."""
    torch.manual_seed(0)
    model = tiny_transformer()
    folder = tmp_path / "from a stranger" / "run"
    recorder = dd.Recorder(model, ["query", "value"], every=1, run_dir=folder, keep="units")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.attach(optimizer):
        train(model, optimizer, 3)
    return folder


def refused(action: Callable[[], object]) -> str:
    with soon(), pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert 10 < len(message) < 1000
    return message


class TestFormulas:
    NAMES = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "'=1", "''=1", "'", "'a", "a=1", '=a,"b"', "")

    @pytest.mark.parametrize("name", NAMES)
    def test_names_read_back_and_are_text_to_a_spreadsheet(self, tmp_path: Path, name: str) -> None:
        directory = create_run(tmp_path / "run")
        content = rows(name, method=name, site=name, stack=name, role=name)
        append_rows(directory, content)
        table = read_run(directory)
        for column in ("run", "method", "site", "stack", "role"):
            assert set(table[column]) == {name}
        with (directory / "trajectory.csv").open(newline="") as file:
            cells = [cell for line in list(csv.reader(file))[1:] for cell in line]
        for cell in cells:
            assert cell[:1] not in "=+@\t\r" or not cell
            if cell.startswith("-"):
                float(cell)  # a number, and a number to a spreadsheet

    def test_numbers_are_written_as_numbers(self, tmp_path: Path) -> None:
        directory = create_run(tmp_path / "run")
        append_rows(directory, rows(signed_delta_magnitude=-0.25))
        assert ",-0.25," in (directory / "trajectory.csv").read_text()


class TestLinks:
    @pytest.mark.parametrize("name", ["run.json", "trajectory.csv"])
    def test_out_of_the_directory_are_not_followed(self, run: Path, name: str) -> None:
        outside = run.parent.parent / "secret"
        (run / name).rename(outside)
        (run / name).symlink_to(outside)
        assert "link out of its run directory" in refused(lambda: dd.load_runs(run))
        (run / name).unlink()
        (run / name).symlink_to(Path("..") / ".." / "secret")
        assert "link out of its run directory" in refused(lambda: dd.load_runs(run))

    def test_within_it_are(self, run: Path) -> None:
        (run / "trajectory.csv").rename(run / "table-1.csv")
        (run / "trajectory.csv").symlink_to("table-1.csv")
        assert len(dd.load_runs(run)) == 16

    def test_in_a_circle(self, run: Path) -> None:
        (run / "run.json").unlink()
        (run / "run.json").symlink_to("run.json")
        refused(lambda: dd.load_runs(run))

    def test_kept_units_behind_one(self, run: Path) -> None:
        (run / "units").rename(run.parent / "elsewhere")
        (run / "units").symlink_to(run.parent / "elsewhere")
        assert "link out of its run directory" in refused(lambda: dd.load_units(run, 1))

    def test_nothing_outside_is_written_or_deleted(
        self, run: Path, tiny_transformer: Callable[[], nn.Module]
    ) -> None:
        precious = run.parent / "precious"
        precious.mkdir()
        (precious / "model.safetensors").write_text("mine")
        (precious / "notes").write_text("mine")
        for name in ("trajectory.csv", "run.json", "run.json.partial"):
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(precious / "notes")
        dd.Recorder(tiny_transformer(), ["query"], run_dir=run, overwrite=True).record()
        assert len(dd.load_runs(run)) == 2
        (run / "weights").symlink_to(precious)
        refused(lambda: dd.Recorder(tiny_transformer(), ["query"], run_dir=run, overwrite=True))
        assert {path.name: path.read_text() for path in precious.iterdir()} == {
            "model.safetensors": "mine",
            "notes": "mine",
        }


class TestWhatIsNoFile:
    @pytest.mark.parametrize("name", ["run.json", "trajectory.csv"])
    @pytest.mark.parametrize("kind", ["pipe", "folder", "10 GB", "10 GB of zeros at the end"])
    def test_is_refused_early(self, run: Path, name: str, kind: str) -> None:
        file = run / name
        before = file.read_bytes()
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        else:
            with file.open("wb") as stream:
                stream.write(before if "zeros" in kind else b"")
                stream.truncate(10 * 10**9)
        refused(lambda: dd.load_runs(run))
        done = CliRunner().invoke(main, ["runs", str(run)])
        assert done.exit_code == 2
        assert done.output.count("\n") == 1

    def test_a_line_without_end(self, run: Path) -> None:
        with (run / "trajectory.csv").open("ab") as stream:
            stream.truncate(3 * 10**9)
        assert "a line of more than" in refused(lambda: read_run(run))


INFO: dict[str, Any] = {
    "run": [3, None, "\ud800"],
    "seed": ["1", 1.5, True, [], math.nan],
    "sites": [[1], "query", [None], {}],
    "targets": [[{}], 3],
    "keep": [["everything"], [1], "units"],
    "versions": [{"torch": 2}, []],
    "hyperparameters": [[], {"lr": math.nan}, {"lr": math.inf}, {"a": "\udfff"}],
    "axis": ["sideways", "Output", "", None],
    "schema_version": [2, "1", None, True, 1.0],
}


@pytest.mark.parametrize(("entry", "value"), [(k, v) for k, vs in INFO.items() for v in vs])
def test_info_is_strict(run: Path, entry: str, value: object) -> None:
    content = json.loads((run / "run.json").read_text()) | {entry: value}
    (run / "run.json").write_text(json.dumps(content))
    refused(lambda: read_info(run))


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "1" * 10_000, '{"seed": 1e999}', "\ufeff{}", "\0"]
)
def test_json_that_hurts(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    refused(lambda: read_info(run))


CELLS = {
    "step": ["-1", "1e300", "inf", "nan", "1_0", "١", " 1", "0x1", "9007199254740993000", "1.5"],
    "units": ["-3", "1e19", ""],
    "head": ["-1", "1e300", "inf"],
    "layer": ["-1", "0.1"],
    "delta_direction": ["-0.1", "2.1", "inf", "1_000", "0.5 ", "-inf", "=1", "NaN", "infinity"],
    "delta_magnitude": ["-1e-3", "-inf", "1,5"],
    "radial_share": ["1.1", "-0.2"],
    "unit_coupling": ["1.5", "-1.5", "inf"],
    "non_finite": ["-1", "many"],
}


@pytest.mark.parametrize(("column", "value"), [(k, v) for k, vs in CELLS.items() for v in vs])
def test_cells_that_no_measurement_gives(run: Path, column: str, value: str) -> None:
    file = run / "trajectory.csv"
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    table.loc[3, column] = value
    table.to_csv(file, index=False)
    assert repr(column) in refused(lambda: read_run(run))


class TestKeptFiles:
    @pytest.mark.parametrize(
        "arrays",
        [
            {},
            {"a": [1.0]},
            {"layers.0.query.magnitude_before": [1.0, 2.0]},
            {"..": [1.0]},
        ],
    )
    def test_units_that_are_none(self, run: Path, arrays: dict[str, list[float]]) -> None:
        given = {name: np.array(values) for name, values in arrays.items()}
        safetensors.numpy.save_file(given, run / "units" / "step-1.safetensors")
        if given:
            refused(lambda: dd.load_units(run, 1))
        else:
            assert dd.load_units(run, 1) == {}

    @pytest.mark.parametrize("sites", ["", "[", "[1]", '[{"name": 1}]', '[{"x": 1}]', "{}"])
    def test_baselines_that_are_none(self, run: Path, sites: str) -> None:
        (run / "weights").mkdir()
        safetensors.torch.save_file(
            {"a": torch.ones(1)}, run / "weights" / "baseline.safetensors", {"sites": sites}
        )
        refused(lambda: dd.remeasure(run))


COMMANDS = (["runs"], ["runs", "--json"], ["coupling", "--level", "pooled"], ["coupling", "--json"])


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
def test_generated_bad_inputs(run: Path) -> None:
    """Through the commands and the API: exit code 0 or 2, one sentence, and no wrong number."""
    rng, runner = random.Random(0), CliRunner()
    files = [run / "run.json", run / "trajectory.csv", run / "units" / "step-1.safetensors"]
    good = {file: file.read_bytes() for file in files}
    names = {column.name: column.kind for column in COLUMNS}
    outcomes = {"read": 0, "refused": 0, "in many lines": 0}
    for i in range(campaign(100, 1500)):
        file = files[rng.choice((0, 1, 1, 1, 2))]
        file.write_bytes(damaged(good[file], rng))
        try:
            with soon():
                table, _ = dd.load_runs(run), dd.load_units(run, 1)
        except InputError as error:
            outcomes["refused" if "\n" not in str(error) else "in many lines"] += 1
        else:
            outcomes["read"] += 1
            told = told_by(run / "trajectory.csv")
            assert told is not None, (i, (run / "trajectory.csv").read_bytes())
            for name, kind in names.items():
                if kind != "text":
                    np.testing.assert_array_equal(
                        table[name].to_numpy(dtype=np.float64, na_value=np.nan),
                        told[name].to_numpy(dtype=np.float64, na_value=np.nan),
                    )
            assert table["delta_direction"].dropna().between(0, 2).all()
        if i % 4 == 0:
            with soon():
                done = runner.invoke(main, [*rng.choice(COMMANDS), str(run)])
            assert done.exit_code in (0, 2), (i, done.output, done.exception)
            if done.exit_code == 2:
                assert done.output.startswith(("Error: ", "Usage: ")), done.output
        file.write_bytes(good[file])
    assert outcomes.pop("in many lines") == 0
    assert min(outcomes.values()) > 0
    assert len(dd.load_runs(run)) == 16


def test_names_that_command_a_terminal_are_shown(run: Path) -> None:
    content = json.loads((run / "run.json").read_text()) | {"model": "\x1b[2Jgone\x07"}
    (run / "run.json").write_text(json.dumps(content))
    shown = CliRunner().invoke(main, ["runs", str(run)]).output
    assert "\\x1b[2Jgone\\x07" in shown
    assert "\x1b" not in shown
