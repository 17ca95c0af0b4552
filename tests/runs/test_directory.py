"""Runs on disk: what is written is read back equal, and what is broken is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch

import dora_dynamics as dd
from dora_dynamics.runs.directory import (
    RunDirectoryError,
    RunInfo,
    append_rows,
    create_run,
    read_info,
    read_run,
    write_info,
)
from dora_dynamics.sites import Site
from dora_dynamics.trajectory import COLUMN_NAMES, TrajectoryError, to_table, trajectory_row

if TYPE_CHECKING:
    from collections.abc import Callable

AWKWARD = ["NA", "null", "", "007", "1e3", 'a "b", c', "größe", "True", " nan ", "line\nbreak"]


def rows(run: str = "a", steps: int = 3, layer: int | None = 1, **changes: Any) -> list[Any]:
    made = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        before = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        after = before + 0.1 * torch.randn(5, 7, generator=generator, dtype=torch.float64)
        change = dd.weight_change(before, after)
        site = Site("layers.1.query", layer, "", "query")
        row = trajectory_row(site, change, run=run, method="FT", step=step, total_decay=0.1 / 3)
        made.append(row | changes)
    return made


def info(**changes: Any) -> RunInfo:
    known: dict[str, Any] = {
        "run": "a",
        "method": "FT",
        "axis": "output",
        "targets": ["query"],
        "sites": ["layers.1.query"],
        "baseline": "given",
        "model": "Tiny",
    }
    return RunInfo(**(known | changes))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, content: list[Any] | None = None, **changes: Any) -> Path:
        directory = create_run(tmp_path / name)
        write_info(directory, info(**({"run": name} | changes)))
        append_rows(directory, rows(name) if content is None else content)
        return directory

    return make


class TestRoundTrip:
    @pytest.mark.parametrize("text", AWKWARD)
    def test_awkward_names(self, text: str, make_run: Callable[..., Path]) -> None:
        content = rows(text, method=text, role=text, site=text, stack=text)
        directory = make_run("run", content, run=text)
        pd.testing.assert_frame_equal(read_run(directory), to_table(content), check_exact=True)
        assert read_info(directory).run == text

    def test_every_float_is_read_exactly(self, make_run: Callable[..., Path]) -> None:
        rng = np.random.default_rng(0)
        bits = rng.integers(0, 2**63, size=400, dtype=np.int64).view(np.float64)
        values = [*bits[np.isfinite(bits)], 5e-324, 1.7976931348623157e308, -0.0, 0.1 + 0.2]
        content = [
            r | {"total_decay": float(v), "step": step}
            for step, (r, v) in enumerate(zip(rows() * 200, values, strict=False))
        ]
        read = read_run(make_run("run", content))["total_decay"].to_numpy()
        np.testing.assert_array_equal(read.view(np.int64), np.array(values).view(np.int64))

    def test_missing_and_infinite(self, make_run: Callable[..., Path]) -> None:
        content = rows(layer=None, total_decay=float("nan"), update_norm=float("inf"))
        table = read_run(make_run("run", content))
        pd.testing.assert_frame_equal(table, to_table(content), check_exact=True)
        assert table["layer"].isna().all()
        assert np.isinf(table["update_norm"]).all()

    def test_run_without_rows(self, make_run: Callable[..., Path]) -> None:
        empty, full = make_run("empty", []), make_run("full")
        assert len(dd.load_runs([empty])) == 0
        both = dd.load_runs([empty, full])
        pd.testing.assert_frame_equal(both, read_run(full))

    def test_columns_of_the_users_own_are_kept(self, make_run: Callable[..., Path]) -> None:
        directory = make_run("run")
        file = directory / "trajectory.csv"
        header, *lines = file.read_text().splitlines()
        file.write_text("\n".join([f"{header},note", *(f"{line},x" for line in lines)]) + "\n")
        table = read_run(directory)
        assert list(table.columns) == [*COLUMN_NAMES, "note"]
        assert set(table["note"]) == {"x"}


class TestCutShort:
    def test_every_cut_keeps_the_complete_rows(self, make_run: Callable[..., Path]) -> None:
        directory = make_run("run")
        file = directory / "trajectory.csv"
        whole, table = file.read_bytes(), read_run(directory)
        header = whole.index(b"\n") + 1
        for length in range(header, len(whole) + 1, 11):
            file.write_bytes(whole[:length])
            complete = whole[:length].count(b"\n") - 1
            pd.testing.assert_frame_equal(read_run(directory), table.head(complete))

    def test_cut_header(self, make_run: Callable[..., Path]) -> None:
        directory = make_run("run")
        (directory / "trajectory.csv").write_text("run,meth")
        with pytest.raises(RunDirectoryError, match=r"trajectory\.csv is not a .*: it is empty\."):
            read_run(directory)


class TestMalformedTable:
    def broken(self, directory: Path, replace: Callable[[list[str]], list[str]]) -> Path:
        file = directory / "trajectory.csv"
        file.write_text("".join(replace(file.read_text().splitlines(keepends=True))))
        return directory

    def test_missing_column(self, make_run: Callable[..., Path]) -> None:
        directory = make_run("run")
        file = directory / "trajectory.csv"
        read_run(directory).drop(columns=["step", "role"]).to_csv(file, index=False)
        with pytest.raises(
            TrajectoryError, match=r"run.trajectory\.csv: the table lacks .*\(s\) step, role"
        ):
            dd.load_runs([directory])

    @pytest.mark.parametrize("edit", ["0,", ""])
    def test_wrong_number_of_fields(self, edit: str, make_run: Callable[..., Path]) -> None:
        def replace(lines: list[str]) -> list[str]:
            shorter = lines[2].partition(",")[2]
            lines[2] = edit + (lines[2] if edit else shorter)
            return lines

        directory = self.broken(make_run("run"), replace)
        fields = len(COLUMN_NAMES) + (1 if edit else -1)
        with pytest.raises(
            RunDirectoryError,
            match=rf"run.trajectory\.csv is not a trajectory: line 3 has {fields} fields where",
        ):
            read_run(directory)

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("step", "soon", r"column 'step' must hold numbers, not 'soon'"),
            ("step", "1.5", r"column 'step' must hold whole numbers: 1\.5 is none"),
            ("step", "", r"column 'step' must hold whole numbers"),
            ("layer", "first", r"column 'layer' must hold numbers, not 'first'"),
            ("layer", "0.5", r"column 'layer' must hold whole numbers: 0\.5 is none"),
            ("delta_direction", "0,3", r"column 'delta_direction' must hold numbers, not '0,3'"),
        ],
    )
    def test_wrong_kind_of_value(
        self, column: str, value: str, message: str, make_run: Callable[..., Path]
    ) -> None:
        directory = make_run("run")
        file = directory / "trajectory.csv"
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        table.loc[1, column] = value
        table.to_csv(file, index=False)
        with pytest.raises(TrajectoryError, match=r"run.trajectory\.csv: " + message):
            dd.load_runs([directory])

    def test_column_twice(self, make_run: Callable[..., Path]) -> None:
        directory = self.broken(
            make_run("run"), lambda lines: [lines[0].replace("stack", "role"), *lines[1:]]
        )
        with pytest.raises(TrajectoryError, match="lacks the column"):
            read_run(directory)

        def double(lines: list[str]) -> list[str]:
            header = lines[0].replace("role,role", "stack,role")
            return [f"step,{header}", *(f"1,{line}" for line in lines[1:])]

        with pytest.raises(TrajectoryError, match=r"the column\(s\) step more than once"):
            read_run(self.broken(directory, double))

    def test_no_text(self, make_run: Callable[..., Path]) -> None:
        directory = make_run("run")
        (directory / "trajectory.csv").write_bytes(b"\xff\xfe\x00\n")
        with pytest.raises(RunDirectoryError, match=r"is not a trajectory: .*utf-8"):
            read_run(directory)


class TestMalformedInfo:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", r"run\.json cannot be read: Expecting"),
            ("", r"run\.json cannot be read: Expecting value"),
            ("[]", r"run\.json is not of schema version 1: record the run again"),
            ("{}", r"run\.json is not of schema version 1"),
            ({"schema_version": 99}, r"run\.json is not of schema version 1"),
            ({"axis": None}, r"run\.json: 'axis' cannot be None"),
            ({"axis": "rows"}, r"run\.json names an unknown axis: 'rows'"),
            ({"run": 3}, r"run\.json: 'run' cannot be 3"),
            ({"targets": "query"}, r"run\.json: 'targets' cannot be 'query'"),
            ({"hyperparameters": []}, r"run\.json: 'hyperparameters' cannot be \[\]"),
            ({"method": ..., "seed": ...}, r"run\.json lacks method, seed"),
        ],
    )
    def test_is_named(self, content: Any, message: str, make_run: Callable[..., Path]) -> None:
        directory = make_run("run")
        file = directory / "run.json"
        if isinstance(content, dict):
            known = json.loads(file.read_text()) | content
            content = json.dumps({k: v for k, v in known.items() if v is not ...})
        file.write_text(content)
        with pytest.raises(RunDirectoryError, match=message):
            dd.load_runs([directory])

    def test_later_additions_are_no_error(self, make_run: Callable[..., Path]) -> None:
        directory = make_run("run")
        file = directory / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"added_later": 1}))
        assert read_info(directory).run == "run"

    def test_missing_files(self, make_run: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(RunDirectoryError, match=r"there is no run directory .*nowhere"):
            dd.load_runs([tmp_path / "nowhere"])
        directory = make_run("run")
        (directory / "trajectory.csv").unlink()
        with pytest.raises(RunDirectoryError, match=r"run is not a run .*no trajectory\.csv"):
            dd.load_runs([directory])


class TestCreate:
    @pytest.mark.parametrize("file", ["trajectory.csv", "run.json"])
    def test_refuses_what_holds_a_run(self, file: str, tmp_path: Path) -> None:
        (tmp_path / file).write_text("precious")
        with pytest.raises(RunDirectoryError, match="already holds a run: choose another folder"):
            create_run(tmp_path)
        assert [f.name for f in tmp_path.iterdir()] == [file]
        assert (tmp_path / file).read_text() == "precious"
        create_run(tmp_path, overwrite=True)
        assert read_run(tmp_path).empty

    def test_other_files_of_the_folder_stay(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        create_run(tmp_path)
        create_run(tmp_path, overwrite=True)
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_where_nothing_can_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(RunDirectoryError, match=r"cannot write to .*file.*it is no folder"):
                create_run(path)
            with pytest.raises(RunDirectoryError, match=r"cannot write to .*file.*it is no folder"):
                dd.Recorder(
                    torch.nn.ModuleDict({"query": torch.nn.Linear(3, 2)}), ["query"], run_dir=path
                )


class TestLoadRuns:
    def test_one_path_or_many_or_an_iterator(self, make_run: Callable[..., Path]) -> None:
        a, b = make_run("a"), make_run("b")
        together = dd.load_runs([a, str(b)])
        assert together["run"].tolist() == ["a"] * 3 + ["b"] * 3
        assert together.index.tolist() == list(range(6))
        pd.testing.assert_frame_equal(dd.load_runs(a), dd.load_runs([str(a)]))
        pd.testing.assert_frame_equal(dd.load_runs(p for p in (a, b)), together)

    def test_no_path(self) -> None:
        nothing: list[str] = []
        for paths in (nothing, iter(nothing)):
            with pytest.raises(RunDirectoryError, match="no run directory was given"):
                dd.load_runs(paths)

    def test_mixed_axes(self, make_run: Callable[..., Path]) -> None:
        a, b = make_run("a"), make_run("b", axis="input")
        with pytest.raises(RunDirectoryError, match=r"different axes \(.*a: output, .*b: input\)"):
            dd.load_runs([a, b])
        assert len(dd.load_runs([b])) == 3

    def test_same_name_in_different_places(self, make_run: Callable[..., Path]) -> None:
        a = make_run("seed-0/ft", rows("ft"), run="ft")
        b = make_run("seed-1/ft", rows("ft"), run="ft")
        c = make_run("lora", rows("lora"), run="lora")
        table = dd.load_runs([a, b, c])
        assert table["run"].unique().tolist() == [a.as_posix(), b.as_posix(), "lora"]
        assert set(table["method"]) == {"FT"}

    def test_same_place_twice(
        self, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run("a")
        monkeypatch.chdir(run.parent)
        with pytest.raises(RunDirectoryError, match="a is given more than once"):
            dd.load_runs([run, Path("a")])
