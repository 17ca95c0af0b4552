"""Trajectories in which ΔM and ΔD correlate as they were told to, and their coupling by a loop."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from dora_dynamics.statistics import Level, coupling

ESTIMATES = ["pearson", "spearman", "slope"]
BOUNDS = [f"{name}_{side}" for name in ESTIMATES for side in ("low", "high")]
UNIT_COLUMNS = ["coupling", "rank_coupling", "slope"]


def simulated(
    *,
    runs: int = 2,
    layers: int = 6,
    steps: int = 4,
    heads: int = 0,
    rho: float = 0.7,
    seed: int = 0,
) -> pd.DataFrame:
    """A trajectory with random effects of layers that correlate by rho."""
    rng = np.random.default_rng(seed)
    shape = (runs, layers, max(heads, 1), steps)
    run, layer, head, step = (axis.ravel() for axis in np.indices(shape))
    mixing = np.linalg.cholesky([[1, rho], [rho, 1]])
    layer_effect = rng.normal(size=(2, 1, layers, 1, 1))
    x, y = np.tensordot(mixing, layer_effect + 0.5 * rng.normal(size=(2, *shape)), axes=1)
    inside = np.tanh(x.ravel())
    table = pd.DataFrame(
        {
            "run": [f"run{r}" for r in run],
            "method": "FT",
            "role": "query",
            "step": 10 * (step + 1),
            "site": [f"layers.{number}.query" for number in layer],
            "layer": layer,
            "stack": "",
            "head": head if heads else np.nan,
            "units": 8,
            "delta_direction": x.ravel(),
            "delta_magnitude": y.ravel(),
            "unit_coupling": inside,
            "unit_rank_coupling": inside**3,
            "unit_slope": 2 * inside,
        }
    )
    for name in ("delta_magnitude", "unit_coupling", "unit_rank_coupling", "unit_slope"):
        table[f"signed_{name}"] = -table[name]
    return table


def one(trajectory: pd.DataFrame, level: Level = "within_step", **options: object) -> pd.Series:
    """The coupling of a trajectory that is one group."""
    result = coupling(trajectory, level=level, **{"permutations": 50} | options)  # type: ignore[arg-type]
    assert len(result) == 1
    return result.iloc[0]


def by_loop(trajectory: pd.DataFrame, cells: list[str]) -> dict[str, float]:
    """The same estimates, cell by cell with scipy."""
    sizes, pearsons, spearmans, sxy, sxx = [], [], [], 0.0, 0.0
    for _, cell in trajectory.groupby(cells, dropna=False):
        x, y = cell["delta_direction"], cell["delta_magnitude"]
        if len(cell) < 3:
            continue
        sizes.append(len(cell))
        pearsons.append(stats.pearsonr(x, y).statistic)
        spearmans.append(stats.spearmanr(x, y).statistic)
        sxy += float(((x - x.mean()) * (y - y.mean())).sum())
        sxx += float(((x - x.mean()) ** 2).sum())
    return {
        "n": sum(sizes),
        "cells": len(sizes),
        "pearson": float(np.average(pearsons, weights=sizes)),
        "spearman": float(np.average(spearmans, weights=sizes)),
        "slope": sxy / sxx,
    }


CELLS: dict[Level, list[str]] = {
    "pooled": ["method"],
    "within_step": ["run", "step"],
    "within_layer": ["run", "site", "head"],
}
