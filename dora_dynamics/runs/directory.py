"""A run on disk: `run.json` says what was run, `trajectory.csv` holds its rows.

Rows are only ever appended, one write per recorded step, so that a killed run keeps every
complete row; a last line that was cut short is left out when the table is read. Both files are
read strictly: a run directory may come from a stranger (see `runs.files`).
"""

from __future__ import annotations

import csv
import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import pandas as pd

from dora_dynamics import provenance, strict_json
from dora_dynamics.decomposition import Axis
from dora_dynamics.runs import trajectory_csv
from dora_dynamics.runs.files import INFO_LIMIT, TABLE_LIMIT, checked_path, opened
from dora_dynamics.runs.files import RunDirectoryError as RunDirectoryError
from dora_dynamics.runs.trajectory_csv import TRAJECTORY_FILE as TRAJECTORY_FILE
from dora_dynamics.schedule import Keep
from dora_dynamics.trajectory import SCHEMA_VERSION, TrajectoryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import BinaryIO

RUN_FILE: Final = "run.json"

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class RunInfo:
    """What `run.json` holds: everything a reader needs to know about a run beside its rows.

    Attributes:
        run: name of the run.
        method: name of the fine-tuning method.
        axis: which axis the units are; never mix runs of different axes.
        targets: what selected the sites.
        sites: paths of the modules that are followed.
        also_known_as: other names of some of these sites: of tied weights, and of a module that is
            used in several places.
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
    also_known_as: dict[str, list[str]] = field(default_factory=dict)
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
    "also_known_as": dict,
    "versions": dict,
    "machine": str,
    "created": str,
}
"""What each entry of `run.json` can be."""
_OF_TEXT: Final = ("targets", "sites", "keep")
"""The entries that are lists of text."""
_ADDED: Final[dict[str, Any]] = {"also_known_as": {}}
"""What entries are that older runs lack."""


def create_run(path: StrPath, *, overwrite: bool = False) -> Path:
    """Make an empty run directory.

    Raises:
        RunDirectoryError: it already holds a run and `overwrite` is False, or it cannot be made.
    """
    directory = Path(path)
    holds_a_run = RunDirectoryError(
        f"{directory} already holds a run: choose another folder, or pass overwrite=True "
        "(--overwrite on the command line) to replace it."
    )
    if not overwrite and _holds_a_run(directory):
        raise holds_a_run
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for kept in ("units", "weights"):
            checked_path(directory / kept, directory)
        # `run.json` first: whoever is killed in between leaves no run that lacks its table.
        for name in (RUN_FILE, f"{RUN_FILE}.partial", TRAJECTORY_FILE):
            (directory / name).unlink(missing_ok=True)  # a link, not what it leads to
        with (directory / TRAJECTORY_FILE).open("xb") as file:
            file.write(trajectory_csv.header())
    except FileExistsError:
        if directory.is_dir():
            raise holds_a_run from None
        raise cannot_write(directory, FileExistsError()) from None
    except OSError as error:
        raise cannot_write(directory, error) from error
    for kept in ("units", "weights"):
        for pattern in ("*.safetensors", "*.partial", ".tmp*"):  # a killed run leaves the latter
            for old in (directory / kept).glob(pattern):
                old.unlink()
    return directory


def cannot_write(directory: StrPath, error: OSError) -> RunDirectoryError:
    """What to say of a folder for a run that the system does not give."""
    is_no_folder = isinstance(error, (FileExistsError, NotADirectoryError))
    reason = "it is no folder" if is_no_folder else error.strerror or str(error)
    return RunDirectoryError(f"cannot write to {directory}: {reason}; choose another folder.")


def _holds_a_run(directory: Path) -> bool:
    """Whether there is something to lose: a `run.json`, or a table of more than its header.

    A run that was killed while its folder was made leaves less.
    """
    table = directory / TRAJECTORY_FILE
    try:
        if os.path.lexists(directory / RUN_FILE):
            return True
        return os.path.lexists(table) and not (
            table.stat().st_size <= len(trajectory_csv.header())
            and trajectory_csv.header().startswith(table.read_bytes())
        )
    except OSError:
        return False  # then it cannot be written either, which is said when that is tried


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
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
        partial.replace(directory / RUN_FILE)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append_rows(directory: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to `trajectory.csv` in one write that reaches the disk before it returns."""
    content = trajectory_csv.formatted(rows)
    with (directory / TRAJECTORY_FILE).open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _no_run(path: StrPath, file: str) -> RunDirectoryError:
    if not Path(path).exists():
        return RunDirectoryError(f"there is no run directory {path}.")
    return RunDirectoryError(f"{path} is not a run directory: it has no {file}.")


@contextmanager
def _reading(path: StrPath, name: str, limit: int, *, otherwise: str) -> Iterator[BinaryIO]:
    """A file of a run directory, open; what goes wrong with it in one sentence.

    `otherwise` says what a file is whose content makes no sense.
    """
    file = Path(path) / name
    try:
        with opened(Path(path), name, limit) as stream:
            yield stream
    except (RunDirectoryError, TrajectoryError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_run(path, name) from error
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, csv.Error) as error:
        raise RunDirectoryError(f"{file} {otherwise}: {_one_line(error)}.") from error


def read_info(path: StrPath) -> RunInfo:
    """Read `run.json` of a run directory.

    Raises:
        RunDirectoryError: there is none, or it is not of this schema.
    """
    file = Path(path) / RUN_FILE
    with _reading(path, RUN_FILE, INFO_LIMIT, otherwise="cannot be read") as stream:
        try:
            content = strict_json.parsed(stream.read(INFO_LIMIT + 1))
        except strict_json.DuplicateKeyError as error:
            raise RunDirectoryError(f"{file} holds {error} twice: keep one of the two.") from error
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise RunDirectoryError(
            f"{file} is not of schema version {SCHEMA_VERSION}: record the run again, or read it "
            "with the dora_dynamics that wrote it."
        )
    names = {f.name for f in fields(RunInfo)}
    for name, added in _ADDED.items():
        content.setdefault(name, added)
    missing = sorted(names - content.keys())
    if missing:
        raise RunDirectoryError(f"{file} lacks {', '.join(missing)}.")
    for name, kind in _JSON_KINDS.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise _impossible(file, name, content[name])
    for name in _OF_TEXT:
        if not _is_of_text(content[name]):
            raise _impossible(file, name, content[name])
    if not all(isinstance(version, str) for version in content["versions"].values()):
        raise _impossible(file, "versions", content["versions"])
    if not all(_is_of_text(others) for others in content["also_known_as"].values()):
        raise _impossible(file, "also_known_as", content["also_known_as"])
    if not set(content["keep"]) <= set(get_args(Keep)):
        raise _impossible(file, "keep", content["keep"])
    if type(content["schema_version"]) is not int:
        raise _impossible(file, "schema_version", content["schema_version"])
    if content["axis"] not in get_args(Axis):
        raise RunDirectoryError(f"{file} names an unknown axis: {content['axis'][:80]!r}.")
    return RunInfo(**{name: content[name] for name in names})


def _is_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(element, str) for element in value)


def _impossible(file: Path, name: str, value: object) -> RunDirectoryError:
    shown = repr(value)
    return RunDirectoryError(
        f"{file}: {name!r} cannot be {shown if len(shown) < 100 else shown[:100] + '…'}."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_run(path: StrPath) -> pd.DataFrame:
    """The trajectory of one run directory.

    A last line without its line end (the run was killed while writing it) is left out.

    Raises:
        RunDirectoryError: the directory holds no readable trajectory.
        TrajectoryError: a column is missing or holds the wrong kind of value.
    """
    file = Path(path) / TRAJECTORY_FILE
    with _reading(path, TRAJECTORY_FILE, TABLE_LIMIT, otherwise="is not a trajectory") as stream:
        try:
            table = trajectory_csv.parsed(stream)
            trajectory_csv.refuse_repeated(table)
        except TrajectoryError as error:
            raise TrajectoryError(f"{file}: {error}") from error
        return table


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
    try:
        places = [Path(path).resolve() for path in paths]
    except (OSError, ValueError, RuntimeError) as error:
        raise RunDirectoryError(f"a path cannot be used: {_one_line(error)}.") from error
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
