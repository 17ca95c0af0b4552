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
from dora_dynamics.errors import InputError
from dora_dynamics.trajectory import (
    COLUMN_NAMES,
    COLUMNS,
    SCHEMA_VERSION,
    TrajectoryError,
    validate,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RUN_FILE: Final = "run.json"
TRAJECTORY_FILE: Final = "trajectory.csv"

StrPath = str | os.PathLike[str]


class RunDirectoryError(InputError):
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


_JSON_KINDS: Final[dict[str, type | tuple[type, ...]]] = {
    "run": str,
    "method": str,
    "axis": str,
    "targets": list,
    "sites": list,
    "baseline": str,
    "model": str,
    "seed": (int, type(None)),
    "hyperparameters": dict,
    "keep": list,
    "versions": dict,
    "machine": str,
    "created": str,
}
"""What each entry of `run.json` can be."""


def create_run(path: StrPath, *, overwrite: bool = False) -> Path:
    """Make an empty run directory.

    Raises:
        RunDirectoryError: it already holds a run and `overwrite` is False, or it cannot be made.
    """
    directory = Path(path)
    holds_a_run = RunDirectoryError(
        f"{directory} already holds a run: choose another folder, or pass overwrite=True to "
        "replace it."
    )
    if (directory / RUN_FILE).exists() and not overwrite:
        raise holds_a_run
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / TRAJECTORY_FILE).open(
            "w" if overwrite else "x", encoding="utf-8", newline=""
        )
        with file:
            csv.writer(file, lineterminator="\n").writerow(COLUMN_NAMES)
    except OSError as error:
        if (directory / TRAJECTORY_FILE).exists() and not overwrite:
            raise holds_a_run from None
        raise RunDirectoryError(f"cannot write to {directory}: {error.strerror}.") from error
    for kept in ("units", "weights"):
        for pattern in ("*.safetensors", "*.partial", ".tmp*"):  # a killed run leaves the latter
            for old in (directory / kept).glob(pattern):
                old.unlink()
    return directory


def as_json(content: object, what: str) -> str:
    """`content` as JSON text; `what` names it in the error.

    Raises:
        TypeError: it holds something that JSON has no word for, NaN and Inf among them.
    """
    try:
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must hold JSON values only: {error}.") from error


def write_info(directory: Path, info: RunInfo) -> None:
    """Write `run.json`, whole or not at all."""
    text = as_json(asdict(info), RUN_FILE)
    partial = directory / f"{RUN_FILE}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(directory / RUN_FILE)


def append_rows(directory: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to `trajectory.csv` in one write that reaches the disk before it returns."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow([_cell(row[name]) for name in COLUMN_NAMES])
    with (directory / TRAJECTORY_FILE).open("ab") as file:
        file.write(buffer.getvalue().encode())
        file.flush()
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
    for name, kind in _JSON_KINDS.items():
        if not isinstance(content[name], kind):
            raise RunDirectoryError(f"{file}: {name!r} cannot be {content[name]!r}.")
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
    try:
        return validate(_parsed(complete.decode("utf-8")))
    except TrajectoryError as error:
        raise TrajectoryError(f"{file}: {error}") from error
    except (ValueError, csv.Error) as error:
        raise RunDirectoryError(f"{file} is not a trajectory: {error}.") from error


def _parsed(text: str) -> pd.DataFrame:
    """The table in CSV text, numbers read exactly as they were written."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader, None)
    if header is None:
        raise ValueError("it is empty")
    rows: list[list[str]] = []
    for row in reader:
        if len(row) != len(header):
            raise ValueError(
                f"line {reader.line_num} has {len(row)} fields where the header has {len(header)}"
            )
        rows.append(row)
    table = pd.DataFrame(rows, columns=header, dtype=str)
    for column in COLUMNS:
        if column.kind != "text" and list(table.columns).count(column.name) == 1:
            table[column.name] = [_number(value, column.name) for value in table[column.name]]
    return table


def _number(text: str, column: str) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        raise TrajectoryError(f"column {column!r} must hold numbers, not {text!r}.") from None


def load_runs(paths: StrPath | Iterable[StrPath]) -> pd.DataFrame:
    """The trajectories of several run directories as one table.

    Runs that carry the same name in different directories are renamed to their paths, so that
    they stay apart as replicates.

    Args:
        paths: run directories, or one.

    Raises:
        RunDirectoryError: `paths` is empty or names a directory twice, a directory is not a run,
            or the runs were measured along different axes.
        TrajectoryError: a table lacks a column or holds the wrong kind of value.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not paths:
        raise RunDirectoryError("no run directory was given.")
    places = [Path(path).resolve() for path in paths]
    twice = [Path(p) for p, place in zip(paths, places, strict=True) if places.count(place) > 1]
    if twice:
        raise RunDirectoryError(f"{twice[0]} is given more than once.")
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
