"""Going on with a run that a checkpoint interrupted, as if it had never stopped."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dynamics._arrays import is_sharded
from dora_dynamics.decomposition import magnitude
from dora_dynamics.runs.directory import RunDirectoryError, RunInfo, read_info, read_run
from dora_dynamics.runs.files import TABLE_LIMIT, checked_path, opened
from dora_dynamics.runs.snapshots import load_baseline
from dora_dynamics.runs.trajectory_csv import TRAJECTORY_FILE, complete_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from dora_dynamics.decomposition import Axis
    from dora_dynamics.runs.directory import StrPath
    from dora_dynamics.sites import Site

_SAME_MAGNITUDE = 1e-6


@dataclass(frozen=True)
class Progress:
    """Where a run stands at the checkpoint it goes on from.

    Attributes:
        directory: the run directory.
        info: its `run.json`.
        step: optimizer steps done.
        table: its rows up to that step; of a step whose rows are not all there, none.
        total_decay: Λ of each tensor at that step; NaN where it is not known.
    """

    directory: Path
    info: RunInfo
    step: int
    table: pd.DataFrame
    total_decay: dict[str, float]

    @property
    def last_recorded(self) -> int | None:
        """The last step that has rows."""
        return int(self.table["step"].max()) if len(self.table) else None

    def without_rows(self) -> Progress:
        """The same, but for the rows that say nothing new about W_0."""
        return replace(self, table=self.table.drop_duplicates(["site", "head"]))

    def check(self, sites: Sequence[Site], axis: str) -> None:
        """Refuse to go on with other sites or another axis: one table holds one kind of row.

        Raises:
            RunDirectoryError: the run followed other sites, or measured along another axis.
        """
        if self.info.axis != axis:
            raise RunDirectoryError(
                f"{self.directory} was measured with axis={self.info.axis!r}: go on with the same."
            )
        if self.info.sites != [site.key for site in sites]:
            raise RunDirectoryError(
                f"{self.directory} follows other weights than the targets select now: go on with "
                f"targets={self.info.targets} and the same granularity."
            )

    def is_baseline(self, site: Site, mean: float) -> bool:
        """Whether the run's baseline has this mean magnitude at the site."""
        of_site = self.table[self.table["site"] == site.name]
        head = of_site["head"]
        of_site = of_site[head.isna() if site.head is None else (head == site.head).fillna(False)]
        known = of_site["magnitude_before"].unique()
        return all(
            math.isclose(mean, value, rel_tol=_SAME_MAGNITUDE) or math.isnan(value)
            for value in known
        )

    def truncate(self) -> None:
        """Drop, on disk, what was recorded after the checkpoint."""
        file = self.directory / TRAJECTORY_FILE
        last = -1 if self.last_recorded is None else self.last_recorded
        partial = file.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with (
            opened(self.directory, TRAJECTORY_FILE, TABLE_LIMIT) as old,
            partial.open("x", encoding="utf-8", newline="") as new,
        ):
            lines = csv.reader(complete_lines(old), strict=True)
            writer = csv.writer(new, lineterminator="\n")
            header = next(lines)
            writer.writerow(header)
            step = header.index("step")
            writer.writerows(line for line in lines if int(float(line[step])) <= last)
            new.flush()
            os.fsync(new.fileno())
        partial.replace(file)
        for kind in ("units", "weights"):
            folder = checked_path(self.directory / kind, self.directory)
            for path in folder.glob("step-*.safetensors"):
                step_of_file = path.stem.removeprefix("step-")
                if step_of_file.isdecimal() and int(step_of_file) > self.step:
                    path.unlink()


def read_progress(
    run_dir: StrPath, resume: int | Mapping[str, Any], sites: Sequence[Site]
) -> Progress:
    """Where the run in `run_dir` stood at a checkpoint; nothing on disk is changed.

    Args:
        run_dir: directory of the run.
        resume: the checkpoint's step, or what `Recorder.state_dict` returned then.
        sites: the sites that are followed.

    Raises:
        RunDirectoryError: `run_dir` holds no run, or one that had not come as far as `resume`.
        TypeError: `resume` is neither a step nor a recorder's state.
    """
    info = read_info(run_dir)
    if isinstance(resume, Mapping):
        step, decay = _state(resume)
    elif type(resume) is int and resume >= 0:
        step, decay = resume, None
    else:
        raise TypeError(
            "resume must be the step of the checkpoint, or what recorder.state_dict() returned "
            f"then, not {resume!r}."
        )
    table = read_run(run_dir)
    table = table[table["step"] <= step]
    if decay is None:
        decay = {site.tensor: math.nan if step else 0.0 for site in sites}
        tensors = {site.name: site.tensor for site in sites}
        at_step = table[table["step"] == step]
        for name, total in zip(at_step["site"], at_step["total_decay"], strict=True):
            if name in tensors:
                decay[tensors[name]] = float(total)
    last = table["step"] == table["step"].max()
    if last.sum() < len(sites):  # the run was killed while it wrote them
        table = table[~last]
    return Progress(Path(run_dir), info, step, table.reset_index(drop=True), decay)


def choose_baseline(
    progress: Progress, sites: Sequence[Site], of_model: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """W_0 of every tensor: the model's own where it is still that, else the one the run kept.

    Args:
        progress: of the run.
        sites: the sites that are followed.
        of_model: the weights that the recorder found in the model.

    Raises:
        RunDirectoryError: the model's weights have moved on and the run kept none.
    """
    means = _mean_magnitudes(sites, of_model, progress.info.axis)
    moved = [site for site in sites if not progress.is_baseline(site, means[site])]
    if not moved:
        return dict(of_model)
    try:
        kept = load_baseline(progress.directory)
    except RunDirectoryError:
        raise RunDirectoryError(
            f"the weight of {moved[0].name} is not the one that {progress.directory} started "
            "from, so that its changes cannot be measured: make the recorder before the "
            "checkpoint is loaded into the model, or record with keep='weights', which keeps the "
            "baseline."
        ) from None
    stored = {site.tensor: weight for site, weight in kept.items()}
    changed = {site.tensor for site in moved}
    return {
        name: stored[name].to(weight.device) if name in changed else weight
        for name, weight in of_model.items()
    }


def _mean_magnitudes(
    sites: Sequence[Site], weights: Mapping[str, Tensor], axis: Axis
) -> dict[Site, float]:
    """Mean magnitude of the units of each site; where weights are sharded, all processes call."""
    found: dict[Site, float] = {}
    sharded: list[tuple[Site, DTensor]] = []
    for site in sites:
        weight = weights[site.tensor]
        if is_sharded(weight):
            sharded.append((site, weight))
        else:
            found[site] = float(magnitude(site.oriented(weight), axis).mean())
    if sharded:
        from dora_dynamics.sharded.changes import mean_magnitudes

        means = mean_magnitudes(sharded, axis)
        found |= {site: mean for (site, _), mean in zip(sharded, means, strict=True)}
    return found


def _state(state: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    try:
        return int(state["step"]), {str(k): float(v) for k, v in state["total_decay"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TypeError(
            "resume is a mapping, but not one that recorder.state_dict() returned."
        ) from error
