"""Taking the rows of a step: on demand, or in a training that no failure may end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_dynamics.recording.baseline_source import BaselineError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from dora_dynamics.recording.baseline import Baselines
    from dora_dynamics.recording.recording import Recording
    from dora_dynamics.recording.watch import Watch


class Taking:
    """Takes the rows of steps, as long as W_0 is not lost.

    W_0 is lost where a copy of it could not be made before it trained.
    """

    def __init__(
        self, model: nn.Module, baseline: Baselines, watch: Watch, recording: Recording
    ) -> None:
        """W_0 of this model is at hand."""
        self._model = model
        self._baseline = baseline
        self._watch = watch
        self._recording = recording
        self._is_lost = False

    def take(self, step: int) -> None:
        """Take the rows of a step, unless they are taken.

        Raises:
            Exception: what goes wrong.
        """
        self._take(step, spare=False)
        self._recording.raise_together()

    def take_in_training(self, step: int) -> None:
        """The same in a training, to whose user what goes wrong is told."""
        if self._is_lost and not self._recording.is_together:
            self._recording.troubles.tell()
            return
        so = "the step is left out of the table"
        with self._recording.sparing_training(step, "measuring", so):
            self._take(step, spare=True)
        self._recording.raise_together()
        self._recording.troubles.tell()

    def _take(self, step: int, *, spare: bool) -> None:
        if self._recording.last == step:
            return
        failure: Exception | None = None
        with self._baseline.at_one_moment():
            try:
                self._watch.look_again()
                self._baseline.expose(self._model)
                if self._is_lost:
                    raise BaselineError("W_0 is lost")
            except Exception as error:
                if not self._recording.is_together:
                    raise
                failure = error  # the other processes are told so by the record
            decay = self._watch.total_decay
            self._recording.record(step, decay, spare=spare, failure=failure)

    def keep_baseline(self, step: int, optimizer: Optimizer) -> None:
        """Before the optimizer's step: copy each W_0 that it is about to train."""
        try:
            self._baseline.before_step(optimizer)
        except Exception as error:
            self._is_lost = True
            so = "W_0 is lost, and nothing more is recorded"
            self._recording.note_failure(step, "baseline", error, so)
