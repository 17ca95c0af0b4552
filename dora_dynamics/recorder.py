"""Recorder: watches a model while it trains and takes rows of the trajectory at chosen steps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dora_dynamics.decomposition import AXES, Axis
from dora_dynamics.errors import InputError
from dora_dynamics.recording import Recording, Taking, Watch
from dora_dynamics.recording.attached import Attached
from dora_dynamics.recording.baseline import Baselines, Place
from dora_dynamics.recording.followed import Followed, common_method, follow
from dora_dynamics.recording.metrics import role_means
from dora_dynamics.recording.optimizers import settings, unwrapped
from dora_dynamics.recording.resume import choose_baseline, read_progress
from dora_dynamics.recording.troubles import warn_user
from dora_dynamics.runs import directory as run_directory
from dora_dynamics.runs.directory import RunInfo
from dora_dynamics.schedule import Keep, Schedule, kept_kinds, schedule
from dora_dynamics.sharded.collectives import all_alike
from dora_dynamics.sharded.models import expose
from dora_dynamics.sites import Site, check_ties, find_sites, once, other_names, tensor_names

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from contextlib import AbstractContextManager

    import pandas as pd
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from dora_dynamics.recording.baseline_source import CapturedBaseline
    from dora_dynamics.recording.resume import Progress
    from dora_dynamics.runs.directory import StrPath

Granularity = Literal["matrix", "head"]


class Recorder:
    """Follows chosen weights of a model through training.

    Make it before training starts: the weights at that moment, below any adapter, are the
    baseline W_0. Then `with recorder.attach(optimizer):` around the loop is all there is to add.
    Watching reads weights and nothing else: the training is bit-identical to one without it.

    A weight that trains is copied once, as baseline; a frozen weight below a LoRA or DoRA is not
    copied, so that writing to it behind torch's back (`weight.data.add_(…)`) moves W_0 unseen.

    A failure of the recorder costs no training: what cannot be measured or written is warned of
    once, and training goes on. Rows that the disk refuses (it is full, the folder was removed)
    wait in memory and are written when it takes them. With a run directory, memory does not grow
    with the steps.

    On a GPU a recorded step queues its measurement and waits for nothing: a thread forms the rows
    and writes them, a moment later, while training goes on. Whatever reads the rows waits for it.

    Where several processes train together, each has a recorder and the main one writes. Weights
    that they hold together (FSDP2, tensor parallelism) stay where they are: at a recorded step all
    processes add up their sums, and no weight is gathered. So `every` must say the same on all of
    them, as a rule in steps does and one in seconds does not. What one process cannot measure is
    NaN on all; with `strict` all of them raise.

    Attributes:
        sites: the weights that are followed.
        step: optimizer steps done so far; a step that mixed precision skipped is none.
        axis: which axis the units are.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str | re.Pattern[str]],
        *,
        every: Schedule = 100,
        run_dir: StrPath | None = None,
        method: str | None = None,
        run: str | None = None,
        axis: Axis = "output",
        granularity: Granularity = "matrix",
        keep: Keep | Collection[Keep] = (),
        baseline: StrPath | Mapping[str, Tensor] | CapturedBaseline | None = None,
        baseline_place: Place = "device",
        seed: int | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: int | Mapping[str, Any] | None = None,
        strict: bool = False,
    ) -> None:
        """Take the baseline and, where a run directory is given, create it.

        Args:
            model: the model that will train.
            targets: which weights to follow: roles ("query"), module names, globs or patterns, as
                in `sites.find_sites`.
            every: steps to record at: every so many, a list of steps, or a callable that is given
                the step and says yes or no. Step 0 and the last step are always recorded.
            run_dir: folder for `run.json`, `trajectory.csv` and what `keep` names; None keeps the
                rows in memory only.
            method: name for the method; by default FT, LoRA or DoRA as the adapters say that the
                model has when `attach` is called.
            run: name for the run; by default the last part of `run_dir`, or the method.
            axis: "output" for one unit per output feature (the paper's choice), or "input".
            granularity: "matrix" takes one row for each weight, and for each of query, key and
                value where they are fused in one; "head" takes one for each attention head.
            keep: "units" keeps per-unit arrays, "weights" the weights themselves, for each
                recorded step; both need `run_dir`.
            baseline: W_0: what `capture_baseline` returned before the adapter was applied, the
                path or hub name of the pre-trained checkpoint, or a state dict. By default the
                model's own weights, below any adapter that leaves them as they were.
            baseline_place: where copies of W_0 wait: "device", beside the weights that train;
                "host", in pinned memory of the host, from where a GPU copies them at each
                recorded step; "file", in the checkpoint that `baseline` names, mapped and copied
                at each recorded step, so that they take no memory at all.
            seed: the seed of this training, noted in `run.json`; nothing is seeded with it.
            hyperparameters: anything else to note in `run.json`, as JSON values.
            overwrite: replace a run that `run_dir` already holds.
            resume: go on with the run that `run_dir` holds, from a checkpoint: its step, or what
                `state_dict()` returned there, which also knows Λ at steps that have no rows. Rows
                after it are dropped. Make the recorder before the checkpoint is loaded into
                the model, so that it finds the baseline there; later it needs the one that
                `keep="weights"` kept.
            strict: raise what goes wrong during training instead of warning of it.

        Warns:
            UserWarning: the base weights are quantised and `baseline` is not given.

        Raises:
            TypeError: `hyperparameters` holds what JSON cannot say.
            BaselineError: `baseline` lacks a followed weight, or is not given and a method rewrote
                the base weights when it started (PiSSA, OLoRA and the like).
            NoDenseWeightError: the model carries a PEFT method without effective weights.
            ShardingError: the model is sharded in a way that hides its weights (FSDP1, DeepSpeed
                ZeRO-3), or `keep="weights"` is asked of one that is sharded.
            InputError: a target matches nothing; `every`, `axis`, `keep` or `baseline_place` is
                not one of those above; the model mixes adapters and `method` is not given.
            RunDirectoryError: `run_dir` already holds a run, is being written by another process,
                or cannot be written.
        """
        if axis not in AXES:
            raise InputError(f"axis must be 'output' or 'input', not {axis!r}.")
        if granularity not in get_args(Granularity):
            raise InputError(f"granularity must be 'matrix' or 'head', not {granularity!r}.")
        expose(model)
        self.sites: list[Site] = once(find_sites(model, targets, granularity))
        self.axis: Axis = axis
        self._model = model
        self._followed: dict[str, Followed] = follow(model, self.sites)
        self._is_method_given = method is not None
        method = method or common_method(self._followed)
        self.step = 0
        self._wanted = schedule(every)
        kept = kept_kinds(keep)
        run_directory.as_json(dict(hyperparameters or {}), "hyperparameters")
        self._baseline = Baselines(model, self.sites, self._followed, baseline, baseline_place)
        info = RunInfo(
            run=run or method,
            method=method,
            axis=axis,
            targets=[t.pattern if isinstance(t, re.Pattern) else t for t in targets],
            sites=[site.key for site in self.sites],
            also_known_as=other_names(self.sites),
            baseline=self._baseline.description,
            model=_model_name(model),
            seed=seed,
            hyperparameters=dict(hyperparameters or {}),
            keep=sorted(kept),
        )
        self._recording = Recording(self.sites, self._baseline, info, name=run, strict=strict)
        self._watch = Watch(self._followed)
        self._taking = Taking(model, self._baseline, self._watch, self._recording)
        self._resumed: Progress | None = None
        self._counts_steps = True
        if run_dir is not None:
            self.write_to(run_dir, overwrite=overwrite, resume=resume)
        elif kept or resume is not None:
            what = "keep= stores files" if kept else "resume= goes on with a run on disk"
            raise InputError(f"{what}: it needs a run_dir.")

    def write_to(
        self,
        run_dir: StrPath,
        *,
        overwrite: bool = False,
        resume: int | Mapping[str, Any] | None = None,
        keep: Keep | Collection[Keep] | None = None,
    ) -> None:
        """Write to this folder from now on; done already where the recorder was given `run_dir`.

        For loops that learn only after the baseline was taken whether training resumes. The
        arguments, and what is raised, are those of `Recorder`.
        """
        self._recording.wait()
        if keep is not None:
            self._recording.keep_files(kept_kinds(keep))
        self._recording.check_kept()
        if resume is None:
            self._recording.begin(Path(run_dir), overwrite=overwrite)
            return
        progress = read_progress(run_dir, resume, self.sites)
        progress.check(self.sites, self.axis)
        self._resumed = progress.without_rows()
        self._check_baseline()
        self.step = progress.step
        self._watch.total_decay = progress.total_decay
        self._recording.resume(progress)

    def continue_from(self, step: int) -> None:
        """Say that the model was trained for `step` steps before, of which there are no rows."""
        self.step = step
        self._watch.forget_decay()

    @property
    def run(self) -> str:
        """Name of the run."""
        return self._recording.info.run

    @property
    def method(self) -> str:
        """Name of the method."""
        return self._recording.info.method

    @property
    def last_recorded(self) -> int | None:
        """The last step that has rows."""
        return self._recording.last

    @property
    def is_attached(self) -> bool:
        """Whether an optimizer is being watched."""
        return self._watch.is_on

    @property
    def trajectory(self) -> pd.DataFrame:
        """The rows taken so far, as a table (see `trajectory.COLUMNS`)."""
        self._recording.wait()
        self._recording.troubles.tell()
        return self._recording.rows.table()

    @property
    def metrics(self) -> dict[str, float]:
        """The last recorded step as a few means over each role, as a trainer's log takes them."""
        self._recording.wait()
        latest = self._recording.rows.latest
        return role_means(row for row in latest if row["step"] == self.last_recorded)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for `resume=` to go on exactly; JSON values only.

        The rows up to this step are written when it returns.
        """
        self._recording.wait()
        self._recording.troubles.tell()
        return {"step": self.step, "total_decay": dict(self._watch.total_decay)}

    def attach(self, optimizer: Optimizer) -> AbstractContextManager[Recorder]:
        """Record on the steps of `optimizer` while the context lasts.

        Step 0 is recorded on entry and the last step on exit, also when training ends in an
        exception (see `give_up`). A later `attach` goes on counting where the one before stopped.

        Rows are those of the weights as the optimizer's step leaves them. What changes them after
        it, as AdaLoRA's `update_and_allocate` does, is seen by `start(optimizer,
        count_steps=False)` and, behind it, `advance_to(step)`; `finish()` ends that. So is a step
        that a CUDA graph replays, which calls no hook.

        Warns:
            UserWarning: the optimizer trains none of the parameters of the followed weights; the
                context is never entered.

        Raises:
            InputError: `optimizer` is none.
        """
        return Attached(self, optimizer)

    def start(self, *optimizers: Optimizer, count_steps: bool = True) -> None:
        """What entering `attach` does, for loops that are no block of code.

        Args:
            optimizers: those that train; Accelerate's and Lightning's wrappers are seen through.
            count_steps: count the optimizer's own steps and record them when they are due. False
                leaves that to `advance_to`.
        """
        self._watch.end()
        self._recording.wait()
        with all_alike(self._baseline.is_sharded):
            expose(self._model)
            watched = list(dict.fromkeys(unwrapped(optimizer) for optimizer in optimizers))
            self._followed = follow(self._model, self.sites)
            check_ties(self.sites, tensor_names(self._model), stacklevel=4)
            self._watch.follow(self._followed)
            self._recording.check_kept()
        self._baseline.settle(self._followed)
        self._check_baseline()
        self._watch.check_trains(watched)
        if not self._is_method_given and self._recording.rows.are_none:
            self._recording.rename(common_method(self._followed))
        self._recording.info.hyperparameters.update(settings(watched))
        self._recording.describe()
        self._counts_steps = count_steps
        missed = self._resumed is not None and self._wanted(self.step)  # killed before it had rows
        if self.last_recorded is None or missed:
            self.record()
        before_step = self._before_step if self._baseline.is_watchful else None
        self._watch.begin(watched, before_step, self._after_step, self._when_captured)

    def _check_baseline(self) -> None:
        """Where a run is resumed: whether W_0 is still what it was, also after the loading."""
        if self._resumed is not None:
            if self._baseline.is_sharded:
                self._baseline.settle(self._followed)
            chosen = choose_baseline(self._resumed, self.sites, self._baseline.weights)
            self._baseline.replace(chosen)
            self._baseline.confirm()

    def finish(self, *, record: bool = True) -> None:
        """What leaving `attach` does: let go of the optimizer and record the last step."""
        self._finish(record=record, alone=False)

    def give_up(self) -> None:
        """What leaving `attach` by an exception does: `finish`, without waiting for anyone.

        Training may have failed on this process alone: where weights are sharded the last step is
        not recorded, because the other processes are not there to add up their sums.
        """
        alone = self._recording.is_together
        self._finish(record=not alone, alone=alone)

    def _finish(self, *, record: bool, alone: bool) -> None:
        self._watch.end()
        try:
            if record:
                self._taking.take_in_training(self.step)
                so = "the quantisation error is not known"
                with self._recording.sparing_training(self.step, "report", so):
                    self._report_quantization()
        finally:
            self._recording.close(alone=alone)
            self._recording.troubles.tell()

    def advance_to(self, step: int) -> None:
        """Take over the step of a loop that counts by itself, and record it when it is due."""
        self.step = step
        try:
            is_due = self._wanted(step)
        except Exception as error:
            self._recording.note_failure(step, "schedule", error, "it is not recorded")
            self._recording.troubles.tell()
            return
        if is_due:
            self._taking.take_in_training(self.step)

    def record(self) -> None:
        """Take the rows of the present step now, whatever the schedule says.

        Does nothing if they are taken already: a step has one row per site. While an optimizer is
        watched, failures are warned of, as at every recorded step; otherwise they are raised.
        """
        if self.is_attached:
            self._taking.take_in_training(self.step)
        else:
            self._taking.take(self.step)

    def _before_step(self, optimizer: Optimizer) -> None:
        self._taking.keep_baseline(self.step, optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        try:
            self._watch.add_decay(optimizer)
        except Exception as error:
            so = "total_decay is not known from here on"
            self._recording.note_failure(self.step, "decay", error, so)
        if self._counts_steps:
            self.advance_to(self.step + 1)

    def _when_captured(self) -> None:
        if self._counts_steps:
            self._recording.note_captured()
            self._recording.troubles.tell()

    def _report_quantization(self) -> None:
        report = self._baseline.quantization_report()
        if report is not None:
            report = f"{report} at step {self.step}"
            baseline = f"{self._baseline.description}; {report}"
            self._recording.info = replace(self._recording.info, baseline=baseline)
            self._recording.describe()
            warn_user(f"{report}, and is part of what is measured.")


def _model_name(model: nn.Module) -> str:
    """Class of the model, with the name or path its configuration carries."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} ({name})" if name else type(model).__name__
