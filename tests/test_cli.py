from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from scipy import stats
from torch import nn

import dora_dynamics as dd
from dora_dynamics.cli import COMMANDS, main
from dora_dynamics.commands.printing import records


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A full fine-tuning and a LoRA run of a small network, recorded on disk."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("FT", "LoRA"):
        torch.manual_seed(3)
        blocks = [nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 7)) for _ in range(5)]
        model = nn.Sequential(*blocks)
        if method == "LoRA":
            dd.apply_lora(model, ["*.0"], rank=2)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        recorder = dd.Recorder(model, ["*.0"], every=3, run_dir=folder / method, seed=3)
        with recorder.attach(optimizer):
            for _ in range(16):
                loss = (model(torch.randn(8, 7)) - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return [str(folder / "FT"), str(folder / "LoRA")]


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_runs_describes_what_was_recorded(runs: list[str]) -> None:
    result = call("runs", *runs, "--json")
    assert result.exit_code == 0
    first, second = json.loads(result.output)
    assert (first["method"], second["method"]) == ("FT", "LoRA")
    assert first["steps"] == [0, 3, 6, 9, 12, 15, 16]
    assert first["rows"] == 35
    assert first["seed"] == 3
    text = call("runs", runs[0]).output
    assert "5 sites" in text
    assert "axis output" in text


def test_several_runs_are_a_table_and_what_they_share_is_said_once(
    runs: list[str], tmp_path: Path
) -> None:
    folder = Path(runs[0]).parent
    copies = tmp_path / "runs"
    shutil.copytree(folder, copies)
    for number in range(4):
        shutil.copytree(folder / "FT", copies / f"copy-{number}")
    info = json.loads((copies / "LoRA" / "run.json").read_text())
    info |= {"run": "a\x1b[2J\nname", "model": "Another", "targets": ["query", "value"]}
    (copies / "LoRA" / "run.json").write_text(json.dumps(info))
    header, *lines = call("runs", str(copies)).output.splitlines()
    table, facts = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert re.split(" {2,}", header) == [
        *("run", "name", "method", "seed", "sites", "steps", "last step", "rows", "recorded (UTC)")
    ]
    rows = {line.split()[0]: re.split(" {2,}", line)[1:] for line in table}
    assert list(rows) == sorted(map(str, copies.iterdir()))
    assert rows[str(copies / "LoRA")][:-1] == [
        *("a\\x1b[2J\\nname", "LoRA", "3", "5", "7", "16", "35")
    ]
    assert rows[str(copies / "FT")][:-1] == ["FT", "3", "5", "7", "16", "35"]
    assert len({line.index("35  20") for line in table}) == 1
    assert f"model     Sequential  (5 runs, one of them {copies / 'FT'})" in facts
    assert f"          Another  ({copies / 'LoRA'})" in facts
    assert f"          query, value  ({copies / 'LoRA'})" in facts
    assert facts.count("axis      output") == 1
    assert sum(line.startswith("baseline") for line in facts) == 1


def test_runs_that_all_differ_are_counted_and_rows_of_nan_too(
    runs: list[str], tmp_path: Path
) -> None:
    for number in range(7):
        shutil.copytree(runs[0], tmp_path / f"{number}")
        info = json.loads((tmp_path / f"{number}" / "run.json").read_text())
        changed = info | {"run": f"{number}", "model": f"model {number}"}
        (tmp_path / f"{number}" / "run.json").write_text(json.dumps(changed))
    file = tmp_path / "3" / "trajectory.csv"
    head, first, *rest = file.read_text().splitlines()
    cells = dict(zip(head.split(","), first.split(","), strict=True)) | {"non_finite": "2"}
    file.write_text("\n".join([head, ",".join(cells.values()), *rest, ""]))
    shown = call("runs", str(tmp_path)).output
    assert "          and 2 others: see --json\n" in shown
    header, *lines = shown.splitlines()
    end = header.index("rows with NaN") + len("rows with NaN")
    assert [line[end - 1] for line in lines[:7]] == [*"   1   "]


def test_coupling_prints_what_scipy_finds(runs: list[str]) -> None:
    result = call("coupling", *runs, "--level", "pooled", "--checkpoints", "all", "--json")
    assert result.exit_code == 0, result.output
    table = dd.load_runs(runs)
    for row in json.loads(result.output):
        points = table[(table["method"] == row["method"]) & (table["step"] > 0)]
        expected = stats.pearsonr(points["delta_direction"], points["delta_magnitude"])
        assert row["pearson"] == pytest.approx(expected.statistic, abs=1e-12)
        assert row["n"] == 30


def test_coupling_table_names_every_level_and_selects_four_checkpoints(runs: list[str]) -> None:
    lines = call("coupling", *runs, "--by", "method").output.splitlines()
    for level in ("pooled", "within_step", "within_layer", "units"):
        assert sum(level in line.split() for line in lines) == 2
        assert sum(line.startswith(f"{level}: ") for line in lines) == 1
    assert any("20" in line.split() for line in lines)


def test_a_file_beside_the_runs_is_left_out_and_one_alone_is_refused(runs: list[str]) -> None:
    beside = Path(runs[0]).parent / "notes.json"
    beside.write_text("{}")
    assert call("runs", *runs, str(beside)).output == call("runs", *runs).output
    result = call("runs", str(beside))
    assert result.exit_code == 2
    assert "is not a run directory" in result.output


@pytest.mark.parametrize("kind", ["magnitude_direction", "delta_magnitude", "coupling"])
@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot_writes_the_very_file_it_is_given(
    runs: list[str], tmp_path: Path, kind: str, ending: str
) -> None:
    out = tmp_path / f"figure.{ending}"
    result = call("plot", *runs, "--kind", kind, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert [file.name for file in tmp_path.iterdir()] == [f"figure.{ending}"]
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert out.read_bytes().startswith(start)


@pytest.mark.parametrize("command", ["runs", "coupling", "plot", "report"])
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(command: str, tmp_path: Path) -> None:
    if command == "report":
        pytest.importorskip("bokeh")
    result = call(command, str(tmp_path))
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "is not a run directory" in result.output


def test_a_path_that_does_not_exist_is_said_to_be_none(tmp_path: Path) -> None:
    result = call("coupling", str(tmp_path / "rnus"))
    assert result.exit_code == 2
    assert result.output == f"Error: there is no run directory {tmp_path / 'rnus'}.\n"


def test_a_mistyped_command_is_told_what_it_resembles() -> None:
    result = call("plto", "runs/ft")
    assert result.exit_code == 2
    assert "Did you mean 'plot'?" in result.output
    assert "Did you mean" not in call("xyzzy").output


@pytest.mark.parametrize("command", ["runs", "coupling"])
def test_a_glob_and_a_folder_of_runs_stand_for_the_runs(command: str, runs: list[str]) -> None:
    folder = Path(runs[0]).parent
    listed = call(command, *sorted(runs), "--json")
    assert listed.exit_code == 0
    for stands_for_them in (folder, folder / "*"):
        assert call(command, str(stands_for_them), "--json").output == listed.output


def test_wrong_usage_is_exit_code_2(runs: list[str]) -> None:
    assert call("coupling", runs[0], "--by", "nothing").exit_code == 2
    assert call("plot", runs[0], "--out", "figure.gif").exit_code == 2
    assert call("coupling").exit_code == 2
    assert call("unknown").exit_code == 2


def test_a_folder_that_cannot_be_written_is_exit_code_1(runs: list[str], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = call("plot", runs[0], "--out", str(blocked / "figure.png"))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")


@pytest.mark.parametrize("lines", [1, 6], ids=["no row", "step 0 only"])
@pytest.mark.parametrize("command", ["coupling", "plot"])
def test_nothing_but_step_0_is_said(
    runs: list[str], tmp_path: Path, command: str, lines: int
) -> None:
    run = Path(runs[0])
    only_start = tmp_path / "run"
    only_start.mkdir()
    (only_start / "run.json").write_bytes((run / "run.json").read_bytes())
    rows = (run / "trajectory.csv").read_text().splitlines(keepends=True)
    (only_start / "trajectory.csv").write_text("".join(rows[:lines]))
    result = call(command, str(only_start))
    assert result.exit_code == 2
    assert result.output.startswith("Error: the runs hold no row beyond step 0, so there is noth")
    assert result.output.count("\n") == 1


def test_what_is_undefined_is_a_dash_with_its_reason(runs: list[str]) -> None:
    output = call("coupling", runs[0], "--by", "layer").output
    assert "nan" not in output
    assert "– [–, –]" in output
    assert "note: fewer than 3 points at any step of a run" in output


def test_json_keeps_every_digit() -> None:
    values = [1.2345678901234567e-17, -0.1, float("nan"), float("inf"), 1e300]
    table = pd.DataFrame({"x": values, "n": range(5), "layer": pd.array([1, None] * 2 + [3])})
    found = json.loads(json.dumps(records(table), allow_nan=False))
    assert [row["x"] for row in found] == [values[0], -0.1, None, None, 1e300]
    assert [row["layer"] for row in found] == [1, None, 1, None, 3]
    assert [row["n"] for row in found] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from dora_dynamics.cli import main;"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0;"
        "heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_help_takes_less_than_0_3_seconds() -> None:
    resource = pytest.importorskip("resource")

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return float(usage.ru_utime + usage.ru_stime)  # of this process: others may be busy

    command = [sys.executable, "-m", "dora_dynamics", "--help"]
    before = spent()
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert spent() - before < 0.3
    assert all(name in shown.stdout for name in COMMANDS)


def test_the_table_survives_json(runs: list[str]) -> None:
    rows = json.loads(call("coupling", *runs, "--level", "units", "--json").output)
    assert pd.DataFrame(rows)["units"].gt(0).all()
