"""The run directory of a comparison: begun, resumed, and never left half-written."""

from __future__ import annotations

import os
import shutil
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.runs import directory as run_directory
from dora_dynamics.runs import lock as run_lock
from dora_dynamics.runs.directory import (
    RUN_FILE,
    TRAJECTORY_FILE,
    RunInfo,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from dora_dynamics.checkpoints.plan import Plan

_MUST_AGREE: Final = ("axis", "method", "run", "targets", "sites")

Row = dict[str, object]


class Output:
    """A run directory that rows are added to, one whole checkpoint at a time."""

    def __init__(self, directory: Path, *, is_new: bool, made: Path | None) -> None:
        self._directory = directory
        self._is_new = is_new
        self._made = made
        self._unlock: Callable[[], object] = lambda: None

    @classmethod
    def begin(cls, path: Path, info: RunInfo, *, overwrite: bool) -> Output:
        """A new run directory with its `run.json`."""
        made = next((p for p in [path, *path.parents][::-1] if not p.exists()), None)
        unlock = _lock(path)
        try:
            directory = run_directory.create_run(path, overwrite=overwrite)
        except BaseException:
            unlock()
            raise
        output = cls(directory, is_new=True, made=made)
        output._unlock = weakref.finalize(output, unlock)
        with output.guarded():
            run_directory.write_info(directory, info)
        return output

    @classmethod
    def resume(cls, path: Path, info: RunInfo, plan: Plan) -> tuple[Output, list[list[Row]]]:
        """The run directory of an interrupted comparison, and its rows by complete checkpoint.

        Raises:
            CheckpointError: it is another comparison's.
        """
        before = run_directory.read_info(path)
        for name in _MUST_AGREE:
            if getattr(before, name) != getattr(info, name):
                raise CheckpointError(
                    f"{path} is the run of another comparison (its {name} differ): resume with "
                    "the same arguments, or choose another folder."
                )
        if before.hyperparameters.get("base") != info.hyperparameters.get("base"):
            raise CheckpointError(
                f"{path} was compared with the base {before.hyperparameters.get('base')}: resume "
                "with the same one."
            )
        groups = _complete(run_directory.read_run(path), plan)
        output = cls(path, is_new=False, made=None)
        output._unlock = weakref.finalize(output, _lock(path))
        with output.guarded():
            _rewrite(path, [row for group in groups for row in group])
            run_directory.write_info(path, info)
        return output, groups

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Add the rows of one checkpoint, all of them or none."""
        file = self._directory / TRAJECTORY_FILE
        with self.guarded():
            size = file.stat().st_size
            try:
                run_directory.append_rows(self._directory, rows)
                with file.open("rb") as written:
                    written.seek(size)
                    complete = written.read().count(b"\n") == len(rows)
                if not complete:
                    raise OSError(0, "the disk took only a part")
            except BaseException:
                os.truncate(file, size)
                raise
        self._is_new = False

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Tell what a disk refuses in one sentence."""
        try:
            yield
        except OSError as error:
            self.discard_if_empty()
            raise CheckpointError(
                f"cannot write to {self._directory}: {error.strerror or error}; what is there is "
                "complete, and --resume continues it."
                if not self._is_new
                else f"cannot write to {self._directory}: {error.strerror or error}."
            ) from error

    def discard_if_empty(self) -> None:
        """Leave nothing behind where not one checkpoint was completed."""
        if not self._is_new:
            return
        self._unlock()
        for name in (TRAJECTORY_FILE, RUN_FILE, f"{RUN_FILE}.partial"):
            (self._directory / name).unlink(missing_ok=True)
        if self._made is not None and not any(p.is_file() for p in self._made.rglob("*")):
            shutil.rmtree(self._made, ignore_errors=True)


def _lock(path: Path) -> Callable[[], object]:
    """The lock of a run directory, which is made where there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return run_lock.hold(path)
    except OSError as error:
        raise run_directory.cannot_write(path, error) from error


def _complete(table: pd.DataFrame, plan: Plan) -> list[list[Row]]:
    """The rows of the first checkpoints of the plan, up to the first that is not complete."""
    groups: list[list[Row]] = []
    for checkpoint in plan.checkpoints:
        rows = [_plain(row) for row in table[table["step"] == checkpoint.step].to_dict("records")]
        expected = [(site.name, site.head) for site in checkpoint.sites]
        if [(row["site"], row["head"]) for row in rows] != expected:
            break
        groups.append(rows)
    return groups


def _plain(row: Mapping[Any, Any]) -> Row:
    return {str(k): None if v is pd.NA else v for k, v in row.items()}


def _rewrite(directory: Path, rows: Sequence[Row]) -> None:
    """Replace the table by these rows, whole or not at all."""
    partial = directory / ".resume.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        run_directory.create_run(partial)
        run_directory.append_rows(partial, rows)
        (partial / TRAJECTORY_FILE).replace(directory / TRAJECTORY_FILE)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
