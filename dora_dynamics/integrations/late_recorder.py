"""What callbacks have in common: their recorder comes late, once there is a model to follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import re
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from dora_dynamics.recorder import Recorder
    from dora_dynamics.runs.directory import StrPath


class LateRecorder:
    """Takes note of what to record, and opens the run when training begins.

    Attributes:
        recorder: the recorder, from when it is made.
    """

    _NOT_YET: ClassVar[str]
    """What to say where nothing is recorded yet."""

    def __init__(
        self,
        targets: Sequence[str | re.Pattern[str]],
        *,
        run_dir: StrPath | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        """Take note of what to record; nothing is read or written yet.

        Args:
            targets: which weights to follow, as in `Recorder`.
            run_dir: folder of the run; None keeps the rows in memory only.
            overwrite: replace a run that `run_dir` already holds, unless training resumes.
            options: the other arguments of `Recorder`.
        """
        self.recorder: Recorder | None = None
        self._targets = targets
        self._run_dir = run_dir
        self._overwrite = overwrite
        self._keep = options.pop("keep", ())
        self._options = options
        self._logged: int | None = None

    @property
    def trajectory(self) -> pd.DataFrame:
        """The rows taken so far.

        Raises:
            RuntimeError: nothing is recorded yet.
        """
        return self._made().trajectory

    def _open(self, resume: int | Mapping[str, Any] | None, step: int) -> Recorder:
        """The recorder, its run directory opened or gone on with at this step of the trainer."""
        recorder = self._made()
        if self._run_dir is not None:
            recorder.write_to(
                self._run_dir, overwrite=self._overwrite, resume=resume, keep=self._keep
            )
        elif resume is not None:
            recorder.continue_from(step)
        return recorder

    def _made(self) -> Recorder:
        if self.recorder is None:
            raise RuntimeError(self._NOT_YET)
        return self.recorder
