"""Going on with a run that a checkpoint interrupted, as if it had never stopped."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dynamics.decomposition import magnitude
from dora_dynamics.run_directory import (
    TRAJECTORY_FILE,
    RunDirectoryError,
    RunInfo,
    read_info,
    read_run,
)
from dora_dynamics.sharded import is_sharded
from dora_dynamics.snapshots import load_baseline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.distributed.tensor import DTensor

    from dora_dynamics.decomposition import Axis
    from dora_dynamics.run_directory import StrPath
    from dora_dynamics.sites import Site

_SAME_MAGNITUDE = 1e-6


@dataclass(frozen=True)
class Progress:
    """Where a run stands at the checkpoint it goes on from.

    Attributes:
        directory: the run directory.
        info: its `run.json`.
        step: optimizer steps done.
        rows: its rows up to that step.
        total_decay: Λ of each tensor at that step; NaN where it is not known.
    """

    directory: Path
    info: RunInfo
    step: int
    rows: list[dict[str, object]]
    total_decay: dict[str, float]

    @property
    def last_recorded(self) -> int | None:
        """The last step that has rows."""
        return max((int(str(row["step"])) for row in self.rows), default=None)

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
        known = {
            float(str(row["magnitude_before"]))
            for row in self.rows
            if row["site"] == site.name and _same_head(row["head"], site.head)
        }
        return all(
            math.isclose(mean, value, rel_tol=_SAME_MAGNITUDE) or math.isnan(value)
            for value in known
        )

    def truncate(self) -> None:
        """Drop, on disk, what was recorded after the checkpoint."""
        file = self.directory / TRAJECTORY_FILE
        header, *lines = csv.reader(io.StringIO(_complete_lines(file), newline=""))
        step = header.index("step")
        kept = [line for line in lines if int(line[step]) <= self.step]
        partial = file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([header, *kept])
        partial.replace(file)
        for kind in ("units", "weights"):
            for path in (self.directory / kind).glob("step-*.safetensors"):
                if int(path.stem.removeprefix("step-")) > self.step:
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
    rows = [{str(k): v for k, v in row.items()} for row in table.to_dict(orient="records")]
    if decay is None:
        decay = {site.tensor: math.nan if step else 0.0 for site in sites}
        tensors = {site.name: site.tensor for site in sites}
        for row in rows:
            if row["step"] == step and row["site"] in tensors:
                decay[tensors[str(row["site"])]] = float(str(row["total_decay"]))
    return Progress(Path(run_dir), info, step, rows, decay)


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


def _same_head(recorded: object, head: int | None) -> bool:
    return str(recorded) == str(head) if head is not None else str(recorded) in ("<NA>", "None")


def _complete_lines(file: Path) -> str:
    text = file.read_bytes()
    return text[: text.rfind(b"\n") + 1].decode("utf-8")
