"""Runs of which it is known what makes ΔM, measured from weights that are really changed.

Four kinds: `turning` (low-rank updates, orthogonal to every unit, or of random direction and so
large, 10% of a unit or more, that what turning adds to a norm shows among 48 units), `own
magnitude` (units turn, and their norms move by themselves), `decay` (weights shrink, and hardly
turn) and `noise` (the same small random change for every unit, at most 2%). What else differs
between real runs differs here: norms between layers, roles and units, the size of the update
between layers, and seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

import numpy as np
import torch

import dora_dynamics as dd
from dora_dynamics.sites import Site
from dora_dynamics.trajectory import to_table, trajectory_row

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Kind = Literal["turning", "own magnitude", "decay", "noise"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

ROLES: Final = ("query", "value")
UNITS: Final = 48
INPUTS: Final = 64
RANK: Final = 4
_STEPS: Final = (62, 75, 88, 100)


@dataclass(frozen=True)
class Design:
    """What all runs of one method share, drawn once a study.

    Attributes:
        kind: what makes ΔM.
        size: ‖w' − w_0‖/‖w_0‖ of a typical unit at the end, without decay.
        orthogonal: whether the update is orthogonal to w_0 in every unit.
        own: how far norms move by themselves, relative to `size`.
        total_decay: Λ at the end.
    """

    kind: Kind
    size: float
    orthogonal: bool = False
    own: float = 0.0
    total_decay: float = 0.0

    @classmethod
    def drawn(cls, kind: Kind, rng: np.random.Generator) -> Design:
        """A design of this kind, anywhere in its range."""

        def between(low: float, high: float) -> float:
            return float(np.exp(rng.uniform(np.log(low), np.log(high))))

        if kind == "turning":
            orthogonal = bool(rng.random() < 0.5)
            return cls(kind, between(0.03 if orthogonal else 0.1, 0.5), orthogonal)
        if kind == "own magnitude":
            size = between(0.01, 0.3)
            own = between(0.7, 3.0)
            decay = between(0.05, 0.3) * size * own if rng.random() < 0.5 else 0.0
            return cls(kind, size, own=own, total_decay=decay)
        if kind == "decay":
            decay = between(0.01, 0.7)
            return cls(kind, between(0.05, 0.5) * decay, total_decay=decay)
        return cls(kind, between(1e-4, 0.02))


def pretrained(layers: int, rng: np.random.Generator) -> dict[Site, Array]:
    """W_0 of every site: norms differ by 30% between layers and roles, by 15% between units."""
    weights = {}
    for layer in range(layers):
        for role in ROLES:
            site = Site(f"layers.{layer}.attention.{role}", layer, "", role)
            norm = np.exp(0.3 * rng.standard_normal() + 0.15 * rng.standard_normal((UNITS, 1)))
            weight = rng.standard_normal((UNITS, INPUTS))
            weights[site] = norm * weight / np.linalg.norm(weight, axis=1, keepdims=True)
    return weights


def study(
    design: Design,
    weights: dict[Site, Array],
    runs: int,
    rng: np.random.Generator,
    method: str = "method",
) -> pd.DataFrame:
    """The trajectory of some runs of one method, from the same pre-trained weights."""
    scales = {site: np.exp(0.3 * rng.standard_normal()) for site in weights}
    rows = []
    for run in range(runs):
        for site, before in weights.items():
            start = torch.from_numpy(before)
            for step, after in _path(design, before, scales[site], rng):
                rows.append(
                    trajectory_row(
                        site,
                        dd.weight_change(start, torch.from_numpy(after)),
                        run=f"{method}-seed{run}",
                        method=method,
                        step=int(step),
                        total_decay=design.total_decay * float(_progress(step)),
                    )
                )
    return to_table(rows)


def _progress(step: int) -> float:
    """Share of the way after so many steps, under a linear schedule of the learning rate."""
    return float(1 - (1 - step / _STEPS[-1]) ** 2 * 0.999)


def _path(
    design: Design, before: Array, scale: float, rng: np.random.Generator
) -> list[tuple[int, Array]]:
    """The weight at every recorded step."""
    norms = np.linalg.norm(before, axis=1, keepdims=True)
    final = _update(design, before, rng) * norms.mean() * design.size * scale
    own = 0.3 * rng.standard_normal() + rng.standard_normal((len(before), 1))
    own *= design.own * design.size * scale
    path = []
    for step in _STEPS:
        progress = _progress(int(step))
        wobble = _update(design, before, rng) * norms.mean() * design.size * scale
        turned = before + progress * final + 0.1 * np.sqrt(progress) * wobble
        if design.kind == "own magnitude":
            turned *= norms / np.linalg.norm(turned, axis=1, keepdims=True)
            turned *= np.exp(progress * own)
            after = turned * np.exp(-design.total_decay * progress)
        else:
            after = turned - before * -np.expm1(-design.total_decay * progress)
        path.append((int(step), after))
    return path


def _update(design: Design, before: Array, rng: np.random.Generator) -> Array:
    """An update whose units are of norm 1 in the mean square."""
    if design.kind == "turning":
        B, A = rng.standard_normal((UNITS, RANK)), rng.standard_normal((RANK, INPUTS))
        if design.orthogonal:
            A -= A @ np.linalg.pinv(before) @ before  # nothing left in the span of the units
        update = B @ A
    else:
        update = rng.standard_normal(before.shape)
    scaled: Array = update / np.sqrt((update**2).sum() / len(update))
    return scaled
