"""From sites and their weights to measured changes: where sources of weights meet the arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_dynamics.decomposition import low_rank_change, weight_change
from dora_dynamics.effective import Dense

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from dora_dynamics.decomposition import Axis, WeightChange
    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.sites import Site


def measure(site: Site, baseline: Tensor, effective: EffectiveWeight, axis: Axis) -> WeightChange:
    """The change from `baseline` (W_0 as the module stores it) to the effective weight."""
    before = site.oriented(baseline)
    if isinstance(effective, Dense):
        return weight_change(before, site.oriented(effective.weight), axis)
    return low_rank_change(
        before,
        effective.A,
        effective.B,
        scaling=effective.scaling,
        magnitude=effective.magnitude,
        axis=axis,
    )


def measure_all(
    weights: Iterable[tuple[Site, Tensor, EffectiveWeight]], axis: Axis
) -> list[WeightChange]:
    """`measure` for many sites at once: (site, baseline, effective weight) of each, in order."""
    return [measure(site, baseline, effective, axis) for site, baseline, effective in weights]
