"""The effective rank of ΔW, from the weights that runs kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from dora_dynamics.effective import Dense, LowRank, built
from dora_dynamics.runs.directory import RunDirectoryError, load_runs, read_info
from dora_dynamics.runs.snapshots import kept_steps, load_baseline, load_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.runs.directory import StrPath
    from dora_dynamics.sites import Site


def effective_rank(update: Tensor) -> float:
    """The exponential of the entropy of the singular values' shares (Roy and Vetterli 2007).

    Args:
        update: ΔW, shape (out, in).

    Returns:
        From 1 (one direction) to min(out, in) (all alike); NaN where the update is zero or not
            finite.
    """
    if not update.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals(update.detach().to(torch.float64))
    total = float(values.sum())
    if total == 0:
        return float("nan")
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def change_of(site: Site, baseline: Tensor, effective: EffectiveWeight) -> Tensor:
    """W' − W_0 of a site, shape (out, in), in float64."""
    before = site.oriented(baseline).to(torch.float64)
    if isinstance(effective, Dense):
        return site.oriented(effective.weight).to(torch.float64) - before
    B, m = site.select(effective.B), effective.magnitude
    if m is None:  # as it is, and not as the difference of two weights
        return effective.scaling * (B.to(torch.float64) @ effective.A.to(torch.float64))
    factors = LowRank(effective.A, B, effective.scaling, site.select(m))
    return built(before, factors) - before


def load_with_rank(paths: Iterable[StrPath]) -> pd.DataFrame:
    """`load_runs`, with a column `effective_rank` where the runs kept their weights.

    The effective rank of ΔW over min(out, in), at each run's last kept step; NaN elsewhere.

    Raises:
        RunDirectoryError: as `load_runs`, or kept weights do not fit each other.
    """
    folders = [Path(path) for path in paths]
    table = load_runs(folders)
    infos = [read_info(path) for path in folders]
    repeated = [info.run for info in infos]
    column = pd.Series(float("nan"), index=table.index)
    for path, info in zip(folders, infos, strict=True):
        if "weights" not in info.keep:
            continue
        name = path.as_posix() if repeated.count(info.run) > 1 else info.run
        rows = table["run"] == name
        last = max(kept_steps(path, "weights"), default=-1)
        rows &= table["step"] == last
        if not rows.any():
            continue
        weights = load_weights(path, last)
        for site, baseline in load_baseline(path).items():
            here = rows & (table["site"] == site.name)
            if site.head is not None:
                here &= table["head"] == site.head
            if site.tensor not in weights or not here.any():
                continue
            try:
                change = change_of(site, baseline, weights[site.tensor])
                column[here] = effective_rank(change) / min(change.shape)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise RunDirectoryError(
                    f"{path}: the kept weights of {site.key} do not fit its baseline: record the "
                    "run again, or take weights out of the keep of its run.json."
                ) from error
    if column.notna().any():
        table["effective_rank"] = column
    return table
