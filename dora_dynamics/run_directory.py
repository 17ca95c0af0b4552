"""A run on disk: `run.json` says what was run, `trajectory.csv` holds its rows.

Rows are only ever appended, one write per recorded step, so that a killed run keeps every
complete row; a last line that was cut short is left out when the table is read.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import pandas as pd

from dora_dynamics import provenance
from dora_dynamics.decomposition import Axis
from dora_dynamics.trajectory import COLUMN_NAMES, COLUMNS, SCHEMA_VERSION, validate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

RUN_FILE: Final = "run.json"
TRAJECTORY_FILE: Final = "trajectory.csv"

StrPath = str | os.PathLike[str]


class RunDirectoryError(ValueError):
    """A run directory cannot be read or must not be written; the message says what to do."""


@dataclass(frozen=True)
class RunInfo:
    """What `run.json` holds: everything a reader needs to know about a run beside its rows.

    Attributes:
        run: name of the run.
        method: name of the fine-tuning method.
        axis: which axis the units are; never mix runs of different axes.
        targets: what selected the sites.
        sites: paths of the modules that are followed.
        baseline: what W_0 is and where it came from.
        model: class of the model, and its name or path where it knows one.
        seed: the seed the user gave, if any.
        hyperparameters: optimizer and its settings, and what else the user gave.
        keep: what is kept beside the table: "units", "weights".
        versions: of Python and the packages.
        machine: kind of machine.
        created: when the run began, UTC.
        schema_version: of the table and of this file.
    """

    run: str
    method: str
    axis: Axis
    targets: list[str]
    sites: list[str]
    baseline: str
    model: str
    seed: int | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=provenance.versions)
    machine: str = field(default_factory=provenance.machine)
    created: str = field(default_factory=provenance.now)
    schema_version: int = SCHEMA_VERSION


def create_run(path: StrPath, *, overwrite: bool = False) -> Path:
    """Make an empty run directory.

    Raises:
        RunDirectoryError: it already holds a run and `overwrite` is False, or it cannot be made.
    """
    directory = Path(path)
    if (directory / TRAJECTORY_FILE).exists() and not overwrite:
        raise RunDirectoryError(
            f"{directory} already holds a run: choose another folder, or pass overwrite=True to "
            "replace it."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / TRAJECTORY_FILE).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMN_NAMES)
    except OSError as error:
        raise RunDirectoryError(f"cannot write to {directory}: {error.strerror}.") from error
    for kept in ("units", "weights"):
        for old in (directory / kept).glob("*.safetensors"):
            old.unlink()
    return directory


def write_info(directory: Path, info: RunInfo) -> None:
    """Write `run.json`, whole or not at all."""
    text = json.dumps(asdict(info), indent=2, ensure_ascii=False, allow_nan=False)
    partial = directory / f"{RUN_FILE}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(directory / RUN_FILE)


def append_rows(directory: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to `trajectory.csv` in one write that reaches the disk before it returns."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow([_cell(row[name]) for name in COLUMN_NAMES])
    with (directory / TRAJECTORY_FILE).open("ab", buffering=0) as file:
        file.write(buffer.getvalue().encode())
        os.fsync(file.fileno())


def read_info(path: StrPath) -> RunInfo:
    """Read `run.json` of a run directory.

    Raises:
        RunDirectoryError: there is none, or it is not of this schema.
    """
    file = Path(path) / RUN_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{path} is not a run directory: it has no {RUN_FILE}.") from error
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{file} is not of schema version {SCHEMA_VERSION}: record the run again, or read it "
            "with the dora_dynamics that wrote it."
        )
    names = {f.name for f in fields(RunInfo)}
    missing = sorted(names - content.keys())
    if missing:
        raise RunDirectoryError(f"{file} lacks {', '.join(missing)}.")
    if content["axis"] not in get_args(Axis):
        raise RunDirectoryError(f"{file} names an unknown axis: {content['axis']!r}.")
    return RunInfo(**{name: content[name] for name in names})


def read_run(path: StrPath) -> pd.DataFrame:
    """The trajectory of one run directory.

    A last line without its line end (the run was killed while writing it) is left out.

    Raises:
        RunDirectoryError: the directory holds no readable trajectory.
        TrajectoryError: a column is missing or holds the wrong kind of value.
    """
    file = Path(path) / TRAJECTORY_FILE
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path} is not a run directory: it has no {TRAJECTORY_FILE}."
        ) from error
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read: {error.strerror}.") from error
    complete = content[: content.rfind(b"\n") + 1]
    text_columns = {column.name: str for column in COLUMNS if column.kind == "text"}
    try:
        table = pd.read_csv(
            io.BytesIO(complete),
            dtype=text_columns,
            na_values={name: [""] for name in COLUMN_NAMES if name not in text_columns},
            keep_default_na=False,
            float_precision="round_trip",
        )
    except ValueError as error:
        raise RunDirectoryError(f"{file} is not a trajectory: {error}.") from error
    return validate(table)


def load_runs(paths: Sequence[StrPath]) -> pd.DataFrame:
    """The trajectories of several run directories as one table.

    Runs that carry the same name in different directories are renamed to their paths, so that
    they stay apart as replicates.

    Args:
        paths: run directories.

    Raises:
        RunDirectoryError: `paths` is empty, a directory is not a run, or the runs were measured
            along different axes.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise RunDirectoryError("no run directory was given.")
    infos = [read_info(path) for path in paths]
    axes = {info.axis for info in infos}
    if len(axes) > 1:
        listed = ", ".join(
            f"{Path(path)}: {info.axis}" for path, info in zip(paths, infos, strict=True)
        )
        raise RunDirectoryError(f"the runs were measured along different axes ({listed}).")
    names = [info.run for info in infos]
    tables = []
    for path, info in zip(paths, infos, strict=True):
        table = read_run(path)
        if names.count(info.run) > 1:
            table["run"] = Path(path).as_posix()
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _cell(value: object) -> object:
    """A value as it stands in the file: shortest text that reads back equal, "" where missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(float(value)) if isinstance(value, float) else value
