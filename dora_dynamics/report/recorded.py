"""The runs a report is about: their rows and what `run.json` says of each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dynamics.report.errors import ReportError
from dora_dynamics.runs.directory import RunInfo, load_runs, read_info
from dora_dynamics.statistics import select_checkpoints

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

    from dora_dynamics.runs.directory import StrPath

CHECKPOINTS = 4


@dataclass(frozen=True)
class Run:
    """One run of the report.

    Attributes:
        name: as in column `run` of the table.
        path: its directory.
        info: what its `run.json` holds.
    """

    name: str
    path: Path
    info: RunInfo


@dataclass(frozen=True)
class Recorded:
    """All runs of a report.

    Attributes:
        runs: in the order they were given, without those that hold no rows.
        empty: paths of runs that hold no rows yet.
        table: the trajectory of them all.
        late: the rows at four late checkpoints of every run, as the paper takes them.
    """

    runs: tuple[Run, ...]
    empty: tuple[Path, ...]
    table: pd.DataFrame
    late: pd.DataFrame


def read(paths: StrPath | Iterable[StrPath]) -> Recorded:
    """Read run directories.

    Raises:
        RunDirectoryError: none was given, one is not a run, or their axes differ.
        ReportError: they hold no row after step 0.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    table = load_runs(paths)
    infos = [read_info(path) for path in paths]
    names = [info.run for info in infos]
    present = set(table["run"].unique())
    runs, empty = [], []
    for path, info in zip(paths, infos, strict=True):
        name = Path(path).as_posix() if names.count(info.run) > 1 else info.run
        if name in present:
            runs.append(Run(name, Path(path), info))
        else:
            empty.append(Path(path))
    strangers = sorted(present - {run.name for run in runs})
    if strangers:
        raise ReportError(
            f"the rows of run {strangers[0]!r} belong to no run.json: run.json and trajectory.csv "
            "of a folder must name the same run."
        )
    late = select_checkpoints(table, count=CHECKPOINTS, kind="late")
    if late.empty:
        raise ReportError(
            "the runs hold no row after step 0, so there is nothing to report: train on, or record "
            "more often."
        )
    return Recorded(tuple(runs), tuple(empty), table, late)
