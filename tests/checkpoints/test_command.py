"""The command `dora-dynamics compare`, as people and machines call it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from dora_dynamics.checkpoints import compare_checkpoints
from dora_dynamics.cli import main

from .models import bert, nudge

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path / "base")
    for step in (5, 10):
        nudge(bert(), size=0.01 * step).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_a_table_for_people_and_a_run_directory(folder: Path) -> None:
    result = call(folder / "base", folder / "run", "--targets", "query,value",
                  "--out", folder / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("step        5  FT", "query", "ΔM", "Wrote 8 rows"):
        assert text in result.output
    assert (folder / "out" / "run.json").is_file()
    again = call(folder / "base", folder / "run", "--targets", "query,value",
                 "--out", folder / "out")  # fmt: skip
    assert again.exit_code == 2
    assert "already holds a run" in again.output
    resumed = call(folder / "base", folder / "run", "--targets", "query,value",
                   "--out", folder / "out", "--resume")  # fmt: skip
    assert resumed.exit_code == 0, resumed.output


def test_json_for_machines(folder: Path) -> None:
    result = call(folder / "base", folder / "run", "--targets", "query", "--json")
    content: dict[str, Any] = json.loads(result.stdout)
    table = compare_checkpoints(folder / "base", folder / "run", ["query"])
    assert [row["delta_magnitude"] for row in content["rows"]] == pytest.approx(
        list(table["delta_magnitude"]), rel=1e-12
    )
    assert [c["step"] for c in content["checkpoints"]] == [5, 10]
    planned = json.loads(
        call(folder / "base", folder / "run", "--dry-run", "--json", "--targets", "query").stdout
    )
    assert planned["plan"]["bytes"] == content["bytes"] == 4 * 2 * 24 * 24 * 4


def test_dry_run_writes_nothing(folder: Path) -> None:
    result = call(folder / "base", folder / "run", "--dry-run", "--out", folder / "out")
    assert result.exit_code == 0
    assert "checkpoint-10" in result.output
    assert "ΔM" not in result.output
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nowhere", "either"],
        ["base", "run", "--targets", "no_such_role"],
        ["base", "run", "--targets", ","],
        ["base", "run", "--targets", "/(/"],
        ["base", "run", "--steps", "one"],
        ["base", "run", "--resume"],
        ["base", "run", "--axis", "diagonal"],
        ["base"],
        ["base", "run", "--out", "base/config.json"],
        ["base", "run", "--out", "base/config.json/below"],
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert "Error: " in result.output
    assert "Traceback" not in result.output


def test_patterns_and_steps(folder: Path) -> None:
    result = call(folder / "base", folder / "run", "--targets", r"/layer\.0\..*query$/",
                  "--steps", "1,2", "--json")  # fmt: skip
    rows = json.loads(result.stdout)["rows"]
    assert [(row["step"], row["layer"]) for row in rows] == [(1, 0), (2, 0)]


def test_a_file_has_the_step_of_its_folder(folder: Path) -> None:
    files = [folder / "run" / f"checkpoint-{step}" / "model.safetensors" for step in (5, 10)]
    assert all(file.is_file() for file in files)
    result = call(folder / "base", *files, "--targets", "query", "--json")
    assert {row["step"] for row in json.loads(result.stdout)["rows"]} == {5, 10}


def test_the_bar_tells_bytes_per_second(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder / "base"), str(folder / "run"), "--targets", "query"]
    main.main(["compare", *arguments], standalone_mode=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    main.main(["compare", *arguments], standalone_mode=False)
    bar = capsys.readouterr().err
    assert "comparing: 100%" in bar
    assert "18.0k/18.0k" in bar
    assert "B/s" in bar


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from dora_dynamics.commands.compare import compare\n"
        "try: compare(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
