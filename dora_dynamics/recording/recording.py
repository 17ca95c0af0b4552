"""What a recorder records: steps measured, rows and kept files written, and what the run is."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dora_dynamics._kernels import queued
from dora_dynamics.recording.backlog import Backlog
from dora_dynamics.recording.measuring import Measuring
from dora_dynamics.recording.rows import RecordedRows
from dora_dynamics.recording.step import RecordedStep
from dora_dynamics.recording.troubles import Troubles, in_words
from dora_dynamics.runs.snapshots import has_baseline
from dora_dynamics.sharded import FailedElsewhereError, ShardingError
from dora_dynamics.sharded.collectives import by_main_process, is_main_process, raise_on_all
from dora_dynamics.sharded.together import Together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from dora_dynamics.recording.baseline import Baselines
    from dora_dynamics.recording.resume import Progress
    from dora_dynamics.runs.directory import RunInfo
    from dora_dynamics.sites import Site


class Recording:
    """The steps of a run that were recorded; on a GPU the last of them may still be measured.

    Attributes:
        info: what `run.json` says; the run, the method and the axis are those of every row.
        keep: the kinds of files that are kept beside the table: "units", "weights".
        rows: what was measured.
        troubles: what went wrong.
        last: the last step that was recorded.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        baseline: Baselines,
        info: RunInfo,
        *,
        name: str | None,
        strict: bool,
    ) -> None:
        """Nothing recorded yet, and no run directory.

        Args:
            sites: the weights that are followed.
            baseline: what they are measured against.
            info: of the run; of the files it names to be kept, those are.
            name: the run's, where it was given; else it is the folder's, or the method's.
            strict: raise what goes wrong instead of taking note of it.
        """
        self.info = info
        self.keep = frozenset(info.keep)
        self.troubles = Troubles(are_fatal=strict)
        self.rows = RecordedRows(self.troubles)
        self.last: int | None = None
        self._sites = sites
        self._baseline = baseline
        self._name = name
        self._folder = ""
        self._backlog = Backlog()
        self._together = Together()
        self._held_back: Exception | None = None
        self.rename(info.method)

    def rename(self, method: str) -> None:
        """Give the run this method, and the name that goes with it."""
        self.info = replace(self.info, run=self._name or self._folder or method, method=method)

    def keep_files(self, kinds: frozenset[str]) -> None:
        """Keep these kinds of files from now on."""
        self.keep = kinds
        self.info = replace(self.info, keep=sorted(kinds))

    def check_kept(self) -> None:
        """Refuse to keep what would have to be gathered.

        Raises:
            ShardingError: weights are to be kept, of a model that is sharded.
        """
        if "weights" in self.keep and self._baseline.is_sharded:
            raise ShardingError(
                "keep='weights' would gather every sharded weight: keep the units, or save "
                "checkpoints (torch.distributed.checkpoint) and measure them with dora-dynamics "
                "compare."
            )

    def begin(self, folder: Path, *, overwrite: bool) -> None:
        """Write to a new run directory from now on.

        Raises:
            RunDirectoryError: it holds a run, another process writes it, or it cannot be made.
        """
        self._by_main_process(partial(self.rows.begin, folder, overwrite=overwrite))
        self._folder = folder.resolve().name
        self.rename(self.info.method)
        self.describe()

    def resume(self, progress: Progress) -> None:
        """Write on behind the rows of a run as far as a checkpoint.

        Raises:
            RunDirectoryError: another process writes it, or it cannot be written.
        """
        self.last = progress.last_recorded
        noted = progress.info.hyperparameters | self.info.hyperparameters
        self.info = replace(progress.info, hyperparameters=noted)
        self.rows.recall(progress.table)
        self._by_main_process(partial(self.rows.resume, progress))
        self.describe()

    def _by_main_process(self, action: Callable[[], object]) -> None:
        by_main_process(action, together=self._baseline.is_sharded)

    def describe(self) -> None:
        """Write `run.json`, now or when the disk takes it."""
        with self._holding_back():
            self.rows.describe(self.info)

    def wait(self) -> None:
        """Return when all rows are there."""
        self._backlog.wait()

    def close(self, *, alone: bool = False) -> None:
        """Wait, write what the disk takes, and let others write to the run directory.

        Args:
            alone: other processes may not be here: training failed on this one.
        """
        with self._holding_back():
            try:
                self._backlog.close()
            finally:
                try:
                    self.rows.write()
                finally:
                    self.rows.release()
        if not alone:
            self.raise_together()
        elif self._held_back is not None:
            raise self._held_back

    @property
    def is_together(self) -> bool:
        """Whether several processes record each step together."""
        return self._baseline.is_together

    @property
    def _raises_together(self) -> bool:
        """Whether what fails on one process is raised by all of them, at the next record's end."""
        return self.is_together and self.troubles.are_fatal

    @contextmanager
    def _holding_back(self) -> Iterator[None]:
        """Keep what is raised for `raise_together`, where all processes are to raise it."""
        try:
            yield
        except Exception as error:
            if not self._raises_together:
                raise
            self._held_back = self._held_back or error

    @contextmanager
    def sparing_training(self, step: int, kind: str, so: str) -> Iterator[None]:
        """Let training go on where this fails; the arguments are those of `note_failure`."""
        try:
            yield
        except Exception as error:
            self.note_failure(step, kind, error, so)

    def note_failure(self, step: int, kind: str, error: Exception, so: str) -> None:
        """Take note of a failure; where it is fatal it is raised, by all processes at once.

        Args:
            step: the step at which it happened.
            kind: the kind of failure, told once.
            error: what was raised.
            so: what comes of it, as the end of a sentence.
        """
        message = f"at step {step} the recorder failed ({in_words(error)}): {so}."
        with self._holding_back():
            self.troubles.note(kind, message, error)

    def raise_together(self) -> None:
        """Raise what failed on any process since the last call, on all of them; they all call this.

        Where failures are not fatal, or no other process is there, nothing is left to raise.
        """
        if self._raises_together:
            error, self._held_back = self._held_back, None
            raise_on_all(error)

    def note_captured(self) -> None:
        """Take note that an optimizer's step is captured in a CUDA graph."""
        self.troubles.note(
            "captured",
            "the optimizer's step is captured in a CUDA graph, whose replays call nobody: "
            "start(optimizer, count_steps=False), and advance_to(step) after each replay.",
            RuntimeError("the optimizer's step is captured in a CUDA graph"),
        )

    def record(
        self,
        step: int,
        total_decay: Mapping[str, float],
        *,
        spare: bool,
        failure: Exception | None = None,
    ) -> None:
        """Measure the weights as they are at this step; on a GPU, begin to.

        Args:
            step: the step.
            total_decay: Λ up to this step, by tensor.
            spare: give a weight that cannot be measured rows of NaN and take note of it, where
                failures are not fatal, rather than raise.
            failure: why this process can measure nothing, though others do.
        """
        if self.is_together:
            self.last = step  # on all processes, whatever fails on one
        spare = spare and not self.troubles.are_fatal
        finish, effective, failed = Measuring(
            self._sites,
            self._baseline,
            self.info.axis,
            self.keep,
            spare,
            self._together,
            failure,
        ).queue()
        with self._holding_back():
            if failed:
                self._note_unmeasured(step, failed)
            else:
                self.troubles.is_over("unmeasured")
            keeps_baseline = "weights" in self.keep and not has_baseline(self.rows.directory)
            recorded = RecordedStep(
                step=step,
                run=self.info.run,
                method=self.info.method,
                sites=self._sites,
                finish=finish,
                total_decay=dict(total_decay),
                effective=effective,
                baseline=self._baseline.weights if keeps_baseline else None,
            )
            self.last = step
            if self._baseline.is_on_gpu and not effective:
                self._backlog.add(partial(self._store_beside_training, recorded), queued())
            else:
                self._store(recorded)

    def _note_unmeasured(self, step: int, failed: Mapping[str, Exception]) -> None:
        if not is_main_process():  # which tells of them all; here is told why
            failed = {n: e for n, e in failed.items() if not isinstance(e, FailedElsewhereError)}
            if not failed:
                return
        (name, error), *others = failed.items()
        more = f", nor can {len(others)} more" if others else ""
        self.troubles.note(
            "unmeasured",
            f"at step {step} the weight of {name} cannot be measured ({in_words(error)}){more}: "
            "its rows are NaN as long as that lasts; the other weights are recorded.",
            error,
        )

    def _store_beside_training(self, recorded: RecordedStep) -> None:
        so = f"step {recorded.step} is left out of the table"
        with self.sparing_training(recorded.step, "measuring", so):
            self._store(recorded)

    def _store(self, recorded: RecordedStep) -> None:
        changes = recorded.finish()
        if self.keep:
            self.rows.write()
            directory = self.rows.directory
            if directory is not None:
                try:
                    recorded.keep(directory, self.keep, changes)
                except OSError as error:
                    what = " and ".join(sorted(self.keep))
                    self.troubles.note(
                        "keeping",
                        f"the {what} of step {recorded.step} could not be kept in {directory}: "
                        f"{in_words(error)}; its rows are recorded.",
                        error,
                    )
        self.rows.add(recorded.rows(changes))
