"""Recorder: watches a model while it trains and takes rows of the trajectory at chosen steps."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import torch
from torch.nn.utils import parametrize

from dora_dynamics import run_directory, snapshots
from dora_dynamics.adapters import DoRA, adapter_of
from dora_dynamics.decomposition import AXES, Axis
from dora_dynamics.effective import (
    Dense,
    EffectiveWeight,
    dense_weight,
    effective_weight,
    magnitude_parameter,
    stored_parameter,
)
from dora_dynamics.measurement import measure_all
from dora_dynamics.run_directory import RunInfo
from dora_dynamics.sites import Site, find_sites
from dora_dynamics.trajectory import to_table, trajectory_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from dora_dynamics.run_directory import StrPath

Keep = Literal["units", "weights"]
Schedule = int | Collection[int] | Callable[[int], bool]

_DECOUPLED: Final = frozenset({"AdamW"})


class Recorder:
    """Follows chosen weights of a model through training.

    Make it before training starts: the weights at that moment, below any adapter, are the
    baseline W_0. Then `with recorder.attach(optimizer):` around the loop is all there is to add.
    Watching reads weights and nothing else: the training is bit-identical to one without it.

    A weight that trains is copied once, as baseline; a frozen weight below a LoRA or DoRA is not
    copied.

    Attributes:
        sites: the weights that are followed.
        step: optimizer steps seen so far.
        run: name of the run.
        method: name of the method.
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
        keep: Keep | Collection[Keep] = (),
        seed: int | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        overwrite: bool = False,
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
            keep: "units" keeps per-unit arrays, "weights" the weights themselves, for each
                recorded step; both need `run_dir`.
            seed: the seed of this training, noted in `run.json`; nothing is seeded with it.
            hyperparameters: anything else to note in `run.json`, as JSON values.
            overwrite: replace a run that `run_dir` already holds.

        Raises:
            TypeError: `hyperparameters` holds what JSON cannot say.
            ValueError: a target matches nothing; `every`, `axis` or `keep` is not one of those
                above; the model mixes adapters and `method` is not given.
            RunDirectoryError: `run_dir` already holds a run, or cannot be written.
        """
        if axis not in AXES:
            raise ValueError(f"axis must be 'output' or 'input', not {axis!r}.")
        self.sites: list[Site] = find_sites(model, targets)
        self.axis: Axis = axis
        self._given = {"run": run, "method": method}
        self._modules = {site: model.get_submodule(site.name) for site in self.sites}
        self.method = method or _method_of(self._modules)
        self.step = 0
        self._wanted = _schedule(every)
        self._keep = _kept(keep)
        if self._keep and run_dir is None:
            raise ValueError("keep= stores files: it needs a run_dir.")
        run_directory.as_json(dict(hyperparameters or {}), "hyperparameters")
        self._baseline: dict[Site, Tensor] = {}
        self._versions: dict[Site, int] = dict.fromkeys(self.sites, 0)
        for site in self.sites:
            self._take_baseline(site)
        self._decay = dict.fromkeys(self.sites, 0.0)
        self._rows: list[dict[str, object]] = []
        self._last_recorded: int | None = None
        self._directory: Path | None = None
        if run_dir is not None:
            self._directory = run_directory.create_run(run_dir, overwrite=overwrite)
        self.run = self._name()
        self._info = RunInfo(
            run=self.run,
            method=self.method,
            axis=axis,
            targets=[t.pattern if isinstance(t, re.Pattern) else t for t in targets],
            sites=[site.name for site in self.sites],
            baseline="the model's own weights when the recorder was made",
            model=_model_name(model),
            seed=seed,
            hyperparameters=dict(hyperparameters or {}),
            keep=sorted(self._keep),
        )
        self._write_info()

    @property
    def trajectory(self) -> pd.DataFrame:
        """The rows taken so far, as a table (see `trajectory.COLUMNS`)."""
        return to_table(self._rows)

    @contextmanager
    def attach(self, optimizer: Optimizer) -> Iterator[Recorder]:
        """Record on the steps of `optimizer` while the context lasts.

        Step 0 is recorded on entry and the last step on exit, also when training ends in an
        exception. A later `attach` goes on counting where the one before stopped.

        Warns:
            UserWarning: the optimizer trains none of the parameters of the followed weights.
        """
        self._settle_baselines(optimizer)
        self._settle_names()
        self._note_optimizer(optimizer)
        if self._last_recorded is None:
            self.record()
        handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.record()

    def record(self) -> None:
        """Take the rows of the present step now, whatever the schedule says.

        Does nothing if they are taken already: a step has one row per site.
        """
        if self._last_recorded == self.step:
            return
        effective = {site: self._effective(site) for site in self.sites}
        changes = dict(
            zip(
                self.sites,
                measure_all(
                    ((site, self._baseline[site], effective[site]) for site in self.sites),
                    self.axis,
                ),
                strict=True,
            )
        )
        rows = [
            trajectory_row(
                site,
                change,
                run=self.run,
                method=self.method,
                step=self.step,
                total_decay=self._decay[site],
            )
            for site, change in changes.items()
        ]
        if self._directory is not None:
            if "weights" in self._keep:
                if self._last_recorded is None:
                    snapshots.save_baseline(self._directory, self._baseline)
                snapshots.save_weights(self._directory, self.step, effective)
            if "units" in self._keep:
                units = {site: change.units for site, change in changes.items()}
                snapshots.save_units(self._directory, self.step, units)
            run_directory.append_rows(self._directory, rows)
        self._rows.extend(rows)
        self._last_recorded = self.step

    def _before_step(self, *_: object) -> None:
        """Copy each baseline that is the live parameter, frozen until now, before it trains."""
        for site, baseline in self._baseline.items():
            if not _is_frozen(baseline):
                self._baseline[site] = baseline.detach().clone()

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        self.step += 1
        self._add_decay(optimizer)
        if self._wanted(self.step):
            self.record()

    def _effective(self, site: Site) -> EffectiveWeight:
        """The effective weight, by its factors only where the baseline is the very base below."""
        module, baseline = self._modules[site], self._baseline[site]
        if baseline is stored_parameter(module):
            if baseline._version != self._versions[site]:
                warnings.warn(
                    f"the frozen weight of {site.name} was changed in place after the recorder "
                    "was made; make the recorder after the weights are loaded.",
                    stacklevel=2,
                )
                self._versions[site] = baseline._version
            return effective_weight(module)
        return Dense(dense_weight(module))

    def _take_baseline(self, site: Site) -> None:
        module = self._modules[site]
        parameter = stored_parameter(module)
        if parameter is None:
            self._baseline[site] = dense_weight(module).clone()
        elif _is_frozen(parameter):
            self._baseline[site] = parameter
            self._versions[site] = parameter._version
        else:
            self._baseline[site] = parameter.detach().clone()

    def _settle_baselines(self, optimizer: Optimizer) -> None:
        """Adapt to what happened since: adapters applied, the model moved to another device."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        follows_something = False
        for site, module in self._modules.items():
            parameter, baseline = stored_parameter(module), self._baseline[site]
            if parameter is not None and baseline is not parameter:
                baseline = self._baseline[site] = baseline.to(parameter.device)
                if _is_frozen(parameter) and torch.equal(baseline, parameter):
                    self._baseline[site] = parameter
                    self._versions[site] = parameter._version
            follows_something |= any(id(p) in trained for p in module.parameters())
        if not follows_something:
            warnings.warn(
                "the optimizer trains no parameter of the followed weights: make it after the "
                "adapters are applied, and check requires_grad.",
                stacklevel=4,
            )

    def _settle_names(self) -> None:
        """Name the method by the adapters that the model has now, until a row carries the name."""
        if self._given["method"] is None and not self._rows:
            self.method = _method_of(self._modules)
            self.run = self._name()
            self._info = replace(self._info, run=self.run, method=self.method)

    def _name(self) -> str:
        """The run's name: as given, else the folder's, else the method."""
        folder = self._directory.resolve().name if self._directory else ""
        return self._given["run"] or folder or self.method

    def _note_optimizer(self, optimizer: Optimizer) -> None:
        groups = [
            {key: _as_plain(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._info.hyperparameters["optimizer"] = type(optimizer).__name__
        self._info.hyperparameters["parameter_groups"] = groups
        self._write_info()

    def _write_info(self) -> None:
        if self._directory is not None:
            run_directory.write_info(self._directory, self._info)

    def _add_decay(self, optimizer: Optimizer) -> None:
        """Add lr · weight_decay of this step to Λ of the sites whose magnitude it shrinks."""
        group_of = {
            id(parameter): group
            for group in optimizer.param_groups
            if group.get("weight_decay", 0.0) != 0
            for parameter in group["params"]
        }
        for site, module in self._modules.items():
            parameter = magnitude_parameter(module)
            if parameter is None:
                self._decay[site] += math.nan if group_of else 0.0
                continue
            group = group_of.get(id(parameter))
            if group is None or parameter.grad is None:
                continue
            decoupled = type(optimizer).__name__ in _DECOUPLED or group.get(
                "decoupled_weight_decay", False
            )
            step = float(group["lr"]) * float(group["weight_decay"])
            self._decay[site] += step if decoupled else math.nan


def _schedule(every: Schedule) -> Callable[[int], bool]:
    if callable(every):
        return every
    if isinstance(every, (int, np.integer)) and not isinstance(every, bool):
        interval = int(every)
        if interval < 1:
            raise ValueError(f"every must be at least 1, not {every}.")
        return lambda step: step % interval == 0
    if isinstance(every, Collection) and all(isinstance(step, (int, np.integer)) for step in every):
        steps = frozenset(int(step) for step in every)
        return lambda step: step in steps
    raise ValueError(f"every must be a number, a list of steps or a callable, not {every!r}.")


def _is_frozen(parameter: Tensor) -> bool:
    """Whether no optimizer will change it: they step over parameters without a gradient."""
    return not parameter.requires_grad and parameter.grad is None


def _as_plain(value: object) -> object:
    """An optimizer's setting as a JSON value, in words where it is none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_as_plain(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _kept(keep: Keep | Collection[Keep]) -> frozenset[str]:
    kinds = frozenset([keep] if isinstance(keep, str) else keep)
    unknown = kinds - set(get_args(Keep))
    if unknown:
        raise ValueError(f"keep may name 'units' and 'weights', not {sorted(unknown)}.")
    return kinds


def _method_of(modules: Mapping[Site, nn.Module]) -> str:
    found = set()
    for module in modules.values():
        adapter = adapter_of(module)
        if adapter is not None:
            found.add("DoRA" if isinstance(adapter, DoRA) else "LoRA")
        else:
            found.add("" if parametrize.is_parametrized(module) else "FT")
    if len(found) > 1 or "" in found:
        raise ValueError("the followed weights do not share one known method: pass method=.")
    return found.pop()


def _model_name(model: nn.Module) -> str:
    """Class of the model, with the name or path its configuration carries."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} ({name})" if name else type(model).__name__
