"""The rows of a recorder: on disk where there is a run, and what the disk refuses in memory.

Memory does not grow with the steps where there is a run directory: a row stays in memory until the
disk has it. When the disk is full, the folder is gone or is another run's by now, rows wait, each
later step tries again, and nothing is lost.
"""

from __future__ import annotations

import errno
import io
import threading
import weakref
from typing import TYPE_CHECKING

import pandas as pd

from dora_dynamics.recording.held_table import HeldTable
from dora_dynamics.recording.troubles import in_words
from dora_dynamics.runs import directory as run_directory
from dora_dynamics.runs import lock as run_lock
from dora_dynamics.runs import trajectory_csv
from dora_dynamics.runs.directory import RUN_FILE, RunDirectoryError
from dora_dynamics.runs.trajectory_csv import TRAJECTORY_FILE
from dora_dynamics.trajectory import to_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dora_dynamics.recording.resume import Progress
    from dora_dynamics.recording.troubles import Troubles
    from dora_dynamics.runs.directory import RunInfo

Row = dict[str, object]


class RecordedRows:
    """Rows in the order in which they were taken.

    Attributes:
        directory: of the run; None where there is none, or where another process writes it.
        latest: the rows of the last step.
    """

    def __init__(self, troubles: Troubles) -> None:
        """No rows and no run directory yet."""
        self.directory: Path | None = None
        self.latest: Sequence[Row] = ()
        self._troubles = troubles
        self._before = to_table([])
        self._here: list[Row] = []
        self._file: HeldTable | None = None
        self._waiting = bytearray()
        self._info: RunInfo | None = None
        self._info_waits = False
        self._unlock: Callable[[], object] | None = None
        self._guard = threading.RLock()

    @property
    def are_none(self) -> bool:
        """Whether no row was taken yet."""
        return not (len(self._before) or self._here or self.latest)

    def begin(self, directory: Path, *, overwrite: bool) -> None:
        """Write to a new run directory from now on; what was taken before is not written there.

        Raises:
            RunDirectoryError: it holds a run, another process writes it, or it cannot be made.
        """
        earlier = self.table()
        self._take_over(directory, lambda: run_directory.create_run(directory, overwrite=overwrite))
        self._before, self._here = earlier, []

    def resume(self, progress: Progress) -> None:
        """Write on behind the rows of a run as far as a checkpoint.

        Raises:
            RunDirectoryError: another process writes it, or it cannot be written.
        """
        self._take_over(progress.directory, progress.truncate)
        self._before = to_table([])

    def recall(self, table: pd.DataFrame) -> None:
        """Take these rows for those so far."""
        last = table[table["step"] == table["step"].max()]
        self.latest = [{str(k): v for k, v in row.items()} for row in last.to_dict("records")]
        self._before, self._here = table, []

    def _take_over(self, directory: Path, prepare: Callable[[], object]) -> None:
        self.release()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock(directory)
            prepare()
            self._file = HeldTable(directory)
        except OSError as error:
            self.release()
            raise run_directory.cannot_write(directory, error) from error
        except BaseException:
            self.release()
            raise
        self.directory = directory
        self._waiting = bytearray()
        self._info_waits = False

    def _lock(self, directory: Path) -> None:
        give_back = run_lock.hold(directory)
        self._unlock = weakref.finalize(self, give_back)

    def release(self) -> None:
        """Let other processes write to the run directory, until rows are added again."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def describe(self, info: RunInfo) -> None:
        """Write `run.json`, now or when the disk takes it."""
        with self._guard:
            self._info, self._info_waits = info, True
            self.write()

    def add(self, rows: Sequence[Row]) -> None:
        """Take the rows of a step, and write them."""
        with self._guard:
            self.latest = rows
            if self.directory is None:
                self._here.extend(rows)
            else:
                self._waiting += trajectory_csv.formatted(rows)
                self.write()

    def write(self) -> None:
        """Write what waits, if the disk takes it now, into its folder, made again if need be."""
        with self._guard:
            directory = self.directory
            if directory is None:
                return
            try:
                self._write(directory)
            except (OSError, RunDirectoryError) as error:
                self._troubles.note(
                    "writing",
                    f"cannot write to {directory}: {in_words(error)}; training goes on, and rows "
                    "wait in memory until they can be written (recorder.trajectory has them all).",
                    error,
                )
            else:
                self._troubles.is_over("writing")

    def _write(self, directory: Path) -> None:
        if self._file is None or not self._file.is_in_place():
            self._make_again(directory)
        elif self._unlock is None:
            self._lock(directory)
        if self._waiting and self._file is not None:
            self._file.append(bytes(self._waiting))
            self._waiting = bytearray()
        if self._info_waits and self._info is not None:
            run_directory.write_info(directory, self._info)
            self._info_waits = False

    def _make_again(self, directory: Path) -> None:
        """Put the table back into its folder, which was removed."""
        self.release()
        if (directory / TRAJECTORY_FILE).exists() or (directory / RUN_FILE).exists():
            raise RunDirectoryError("another run was begun there")
        removed = FileNotFoundError(errno.ENOENT, "the run directory was removed", str(directory))
        if self._troubles.are_fatal:
            raise removed
        directory.mkdir(exist_ok=True)
        self._lock(directory)
        run_directory.create_run(directory)
        made, old = HeldTable(directory), self._file
        if old is not None:
            stream = old.stream()
            stream.readline()
            while content := stream.read(1 << 24):
                made.append(content)
        self._file, self._info_waits = made, True
        if not self._troubles.knows("writing"):
            self._troubles.note(
                "removed",
                f"{directory} was removed while it was recorded: it was made again with all its "
                "rows, without the units and weights that were kept.",
                removed,
            )

    def table(self) -> pd.DataFrame:
        """All rows, those on disk read back."""
        with self._guard:
            return self._table()

    def _table(self) -> pd.DataFrame:
        parts = [self._before, to_table(self._here)]
        if self._file is not None:
            parts.append(trajectory_csv.parsed(self._file.stream()))
        if self._waiting:
            waiting = io.BytesIO(trajectory_csv.header() + self._waiting)
            parts.append(trajectory_csv.parsed(waiting))
        filled: list[pd.DataFrame] = [part for part in parts if len(part)] or parts[:1]
        return pd.concat(filled, ignore_index=True)
