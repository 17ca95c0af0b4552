"""Weights and per-unit arrays of a run, kept as safetensors so that they can be measured again.

`weights/baseline.safetensors` holds W_0 of every site, `weights/step-N.safetensors` what there is
to know at step N: the full effective weight, or LoRA's and DoRA's factors.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
import safetensors
import safetensors.numpy
import safetensors.torch

from dora_dynamics import strict_json
from dora_dynamics.decomposition import AXES, Axis, UnitChange
from dora_dynamics.effective import Dense, EffectiveWeight, LowRank
from dora_dynamics.errors import InputError
from dora_dynamics.measurement import summarize_all
from dora_dynamics.runs.directory import RunDirectoryError, read_info, read_run
from dora_dynamics.runs.files import checked_path
from dora_dynamics.sites import Site
from dora_dynamics.trajectory import to_table, trajectory_row
from dora_dynamics.units.summary import unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from dora_dynamics.runs.directory import StrPath

BASELINE_FILE: Final = "baseline.safetensors"
_BY_COLUMN: Final = "by_column"
"""Entry of a file's metadata: the matrices to lay column by column again when they are read."""
_UNIT_ARRAYS: Final = tuple(f.name for f in fields(UnitChange))
_POSSIBLE: Final = {
    "magnitude_before": (0.0, np.inf),
    "magnitude_after": (0.0, np.inf),
    "one_minus_cosine": (0.0, 2.0),
}
_ROUNDING: Final = 1e-9
_UNITS_LIMIT: Final = 1 << 32
"""Bytes of the largest file of units that is read: those of 400 billion weights take a tenth."""


def has_baseline(directory: Path | None) -> bool:
    """Whether W_0 is kept there already; nothing is to be kept where there is no directory."""
    return directory is None or (directory / "weights" / BASELINE_FILE).exists()


def save_baseline(directory: Path, baselines: Mapping[Site, Tensor]) -> None:
    """Write W_0 of every site, with what is needed to describe the sites again."""
    _save(
        directory / "weights" / BASELINE_FILE,
        {site.tensor: weight for site, weight in baselines.items()},
        {"sites": json.dumps([asdict(site) for site in baselines])},
    )


def save_weights(directory: Path, step: int, weights: Mapping[Site, EffectiveWeight]) -> None:
    """Write the effective weights of one step: whole, or by their low-rank factors."""
    tensors: dict[str, Tensor] = {}
    scalings: dict[str, float] = {}
    for site, effective in weights.items():
        if isinstance(effective, Dense):
            tensors[f"{site.tensor}.weight"] = effective.weight
            continue
        tensors[f"{site.tensor}.lora_A"] = effective.A
        tensors[f"{site.tensor}.lora_B"] = effective.B
        if effective.magnitude is not None:
            tensors[f"{site.tensor}.magnitude"] = effective.magnitude
        scalings[site.tensor] = effective.scaling
    _save(_step_file(directory, "weights", step), tensors, {"scaling": json.dumps(scalings)})


def save_units(directory: Path, step: int, units: Mapping[Site, UnitChange]) -> None:
    """Write the per-unit arrays of one step, float64, as `<site>.<array>`."""
    arrays = {
        f"{site.key}.{name}": np.ascontiguousarray(getattr(change, name))
        for site, change in units.items()
        for name in _UNIT_ARRAYS
    }
    path = _step_file(directory, "units", step)
    _write(path, partial(safetensors.numpy.save_file, arrays))


def load_units(path: StrPath, step: int) -> dict[str, UnitChange]:
    """The per-unit arrays a run kept at one step, by site.

    Raises:
        RunDirectoryError: the run kept none at that step.
    """
    path = _existing(_step_file(Path(path), "units", step))
    if path.stat().st_size > _UNITS_LIMIT:
        raise RunDirectoryError(f"{path} is too large to be the units of a run.")
    try:
        arrays = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from error
    sites = dict.fromkeys(key.rpartition(".")[0] for key in arrays)
    with _understood(path):
        return {site: _units_of(site, arrays) for site in sites}


def _units_of(site: str, arrays: Mapping[str, NDArray[np.float64]]) -> UnitChange:
    found = {name: _float64(arrays[f"{site}.{name}"]) for name in _UNIT_ARRAYS}
    for name, (lowest, highest) in _POSSIBLE.items():
        if (found[name] < lowest - _ROUNDING).any() or (found[name] > highest + _ROUNDING).any():
            raise ValueError(f"its {name} of {site} holds what no measurement gives")
    if len({array.shape for array in found.values()}) != 1 or found[_UNIT_ARRAYS[0]].ndim != 1:
        raise ValueError(f"its arrays of {site} do not fit each other")
    return UnitChange(**found)


def load_weights(path: StrPath, step: int) -> dict[str, EffectiveWeight]:
    """The effective weights a run kept at one step, by site.

    Raises:
        RunDirectoryError: the run kept none at that step.
    """
    tensors, metadata = _load(_step_file(Path(path), "weights", step))
    with _understood(Path(path)):
        weights: dict[str, EffectiveWeight] = {
            site: LowRank(
                tensors[f"{site}.lora_A"],
                tensors[f"{site}.lora_B"],
                float(scaling),
                tensors.get(f"{site}.magnitude"),
            )
            for site, scaling in strict_json.parsed(metadata["scaling"]).items()
        }
    for key, tensor in tensors.items():
        site, _, kind = key.rpartition(".")
        if kind == "weight":
            weights[site] = Dense(tensor)
    return weights


def load_baseline(path: StrPath) -> dict[Site, Tensor]:
    """W_0 of every site of a run that kept its weights.

    Raises:
        RunDirectoryError: the run kept none.
    """
    tensors, metadata = _load(Path(path) / "weights" / BASELINE_FILE)
    with _understood(Path(path)):
        sites = [Site(**description) for description in strict_json.parsed(metadata["sites"])]
        return {site: tensors[site.tensor] for site in sites}


def remeasure(path: StrPath, axis: Axis | None = None) -> pd.DataFrame:
    """Compute a run's trajectory again from the weights it kept.

    Args:
        path: directory of a run recorded with `keep="weights"`.
        axis: the axis to measure along; by default the recorded one, which gives the recorded
            trajectory again.

    Returns:
        The trajectory, row by row that of `trajectory.csv`. `total_decay`, which no weight tells,
            is the recorded one.

    Raises:
        RunDirectoryError: the run kept no weights.
        InputError: the axis is unknown.
    """
    info = read_info(path)
    axis = info.axis if axis is None else axis
    if axis not in AXES:
        raise InputError(f"axis must be 'output' or 'input', not {axis!r}.")
    baselines = load_baseline(path)
    sites = {(site.name, site.head): site for site in baselines}
    table = read_run(path)
    rows: list[dict[str, object]] = []
    for step in table["step"].unique():
        recorded = table[table["step"] == step]
        weights = load_weights(path, int(step))
        heads = [None if pd.isna(head) else int(head) for head in recorded["head"]]
        measured = [sites[name, head] for name, head in zip(recorded["site"], heads, strict=True)]
        known = [site for site in measured if site.tensor in weights]
        found = summarize_all(
            ((site, baselines[site], weights[site.tensor]) for site in known), axis
        )
        by_site = dict(zip(known, found, strict=True))
        summaries = [
            by_site.get(site) or unmeasured(site.units(baselines[site].shape, axis))
            for site in measured
        ]
        rows.extend(
            trajectory_row(
                site,
                summary,
                run=info.run,
                method=info.method,
                step=int(step),
                total_decay=total_decay,
                head=site.head,
            )
            for site, summary, total_decay in zip(
                measured, summaries, recorded["total_decay"], strict=True
            )
        )
    return to_table(rows)


def kept_steps(directory: Path, kind: str) -> list[int]:
    """The steps of which a run kept "units" or "weights", in order."""
    files = (directory / kind).glob("step-*.safetensors")
    names = (file.stem.removeprefix("step-") for file in files)
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,15}", name))


def _step_file(directory: Path, kind: str, step: int) -> Path:
    return directory / kind / f"step-{step}.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    owned = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    metadata |= {_BY_COLUMN: json.dumps([name for name in owned if _is_by_column(owned[name])])}
    contiguous = {name: tensor.contiguous() for name, tensor in owned.items()}
    _write(path, partial(safetensors.torch.save_file, contiguous, metadata=metadata))


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Let `save` write a file, whole or not at all.

    Raises:
        OSError: the disk refuses it.
    """
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.unlink(missing_ok=True)
    try:
        save(unfinished)
        unfinished.replace(path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        existing = _existing(path)
        if existing.stat().st_size > _memory():
            raise RunDirectoryError(f"{path} is larger than the memory of this machine.")
        with _understood(path), safetensors.safe_open(existing, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name in strict_json.parsed(metadata.get(_BY_COLUMN, "[]")):
                tensors[name] = tensors[name].T.contiguous().T
            return tensors, metadata
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from error


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Say in one sentence that a file is not what this package writes."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, RunDirectoryError):
            raise
        raise _unreadable(path, error) from error


def _memory() -> float:
    """Bytes of memory that the machine has, Inf where it does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _is_by_column(tensor: Tensor) -> bool:
    """Whether a matrix lies column by column in memory, which sets the order of its sums."""
    return tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()


def _unreadable(path: Path, error: Exception) -> RunDirectoryError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return RunDirectoryError(
        f"{path} cannot be read ({reason}): it is damaged, or not of this package."
    )


def _existing(path: Path) -> Path:
    if path.exists():
        if not path.is_file():
            raise RunDirectoryError(f"{path} cannot be read: it is no regular file.")
        return checked_path(path, path.parent.parent)
    kind = path.parent.name
    steps = kept_steps(path.parent.parent, kind)
    if not steps:
        raise RunDirectoryError(f"{path} does not exist: record the run with keep={kind!r}.")
    listed = ", ".join(map(str, steps))
    raise RunDirectoryError(f"{path} does not exist: the run kept its {kind} at step {listed}.")


def _float64(array: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(array, dtype=np.float64)
