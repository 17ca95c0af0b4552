"""A callback that records the training of a Lightning Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from dora_dynamics.integrations.late_recorder import LateRecorder
from dora_dynamics.recorder import Recorder

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RecorderCallback(LateRecorder, Callback):
    """Records a fit: `Trainer(..., callbacks=[RecorderCallback(["query"], run_dir="runs/ft")])`.

    The baseline is taken when the fit is set up, before a checkpoint is loaded, so that
    `fit(..., ckpt_path=...)` goes on with the same run; what that takes is saved in Lightning's
    own checkpoints. Steps are `trainer.global_step`. Means over each role go to every logger of
    the trainer, under `dora_dynamics/`.

    Attributes:
        recorder: the recorder, from when a fit is set up.
    """

    _NOT_YET = "nothing is recorded yet: fit with a Trainer that has the callback."
    _resumed: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the baseline."""
        if stage == "fit":
            self._resumed = None
            self.recorder = Recorder(pl_module, self._targets, **self._options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the run directory, or go on with the run it holds, and record the first step."""
        resume = self._resumed or trainer.global_step or None
        recorder = self._open(resume, trainer.global_step)
        recorder.start(*trainer.optimizers, count_steps=False)
        self._log(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Record when an optimizer step was made and is due."""
        recorder = self._made()
        if trainer.global_step != recorder.step:
            recorder.advance_to(trainer.global_step)
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last step."""
        self._made().finish()
        self._log(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Record the last step also where training ends early."""
        if self.recorder is not None and self.recorder.is_attached:
            self.recorder.give_up()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning saves in its checkpoints."""
        return {} if self.recorder is None else self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning found in the checkpoint that it resumes from."""
        self._resumed = state_dict or None

    def _log(self, trainer: Trainer) -> None:
        recorder = self._made()
        if recorder.last_recorded == self._logged:
            return
        self._logged = recorder.last_recorded
        for logger in trainer.loggers:
            logger.log_metrics(recorder.metrics, step=trainer.global_step)
