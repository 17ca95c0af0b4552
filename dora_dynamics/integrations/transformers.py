"""A callback that records the training of transformers' Trainer, and of all that build on it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from dora_dynamics.integrations.late_recorder import LateRecorder
from dora_dynamics.recorder import Recorder

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

_NOTED: Final = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "bf16",
    "fp16",
)
"""Training arguments that `run.json` tells beside the optimizer's own settings."""


class RecorderCallback(LateRecorder, TrainerCallback):
    """Records a Trainer's training: `Trainer(..., callbacks=[RecorderCallback(["query"], ...)])`.

    The baseline is taken when the Trainer is made, before a checkpoint is loaded, so that
    `train(resume_from_checkpoint=...)` goes on with the same run. Steps are those the Trainer
    counts and names its checkpoints by; besides the scheduled ones it records those it saves at,
    so that each checkpoint has its rows. Means over each role go into the Trainer's own log, and
    so to every logger it reports to, under `dora_dynamics/`.

    The recorder's `seed` and `hyperparameters` are taken from the training arguments where they
    are not given.

    Attributes:
        recorder: the recorder, from when the Trainer is made.
    """

    _NOT_YET = "nothing is recorded yet: give the callback to a Trainer."
    _model: nn.Module | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the baseline."""
        if model is not None:
            self._make_recorder(args, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Open the run directory, or go on with the run it holds, and record the first step."""
        _come_first(self)
        if model is not None and (self.recorder is None or self._model is not model):
            self._make_recorder(args, model)  # added late, or the model is made by model_init
        recorder = self._open(state.global_step or None, state.global_step)
        recorder.start(optimizer, count_steps=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record when the step is due, and the last one before any best model is loaded."""
        recorder = self._made()
        recorder.advance_to(state.global_step)
        if state.global_step >= state.max_steps or control.should_training_stop:
            recorder.record()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the step that a checkpoint is saved at: from here training can resume."""
        self._made().record()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put what was recorded since the last log into this one."""
        recorder = self.recorder
        if recorder is None or logs is None or recorder.last_recorded == self._logged:
            return
        self._logged = recorder.last_recorded
        metrics = recorder.metrics | {"dora_dynamics/step": float(recorder.last_recorded or 0)}
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the last step, unless the weights are those of an earlier one by now."""
        best_was_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        self._made().finish(record=not best_was_loaded)

    def _make_recorder(self, args: TrainingArguments, model: nn.Module) -> None:
        noted = {name: getattr(args, name, None) for name in _NOTED}
        noted = {k: str(v) if hasattr(v, "value") else v for k, v in noted.items()}
        options = {"seed": args.seed} | self._options
        options["hyperparameters"] = noted | dict(options.get("hyperparameters") or {})
        self._model = model
        self.recorder = Recorder(model, self._targets, **options)


def _come_first(callback: TrainerCallback) -> None:
    """Move a callback before all others of its Trainer, so that loggers see what it logs.

    A Trainer calls its callbacks in order, its loggers first, and tells none of them about the
    others; the handler that is calling is found among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks = [callback, *(c for c in handler.callbacks if c is not callback)]
            return
        frame = frame.f_back  # type: ignore[assignment]
