"""One recorded step: its rows, once its measurement is done, and the files kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dora_dynamics.runs import snapshots
from dora_dynamics.trajectory import trajectory_row

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from dora_dynamics.effective import EffectiveWeight
    from dora_dynamics.measurement import Measured
    from dora_dynamics.sites import Site

T = TypeVar("T")


@dataclass(frozen=True)
class RecordedStep:
    """A step whose measurement may still be going on, with all that its rows say beside it.

    Attributes:
        step: the optimizer step.
        run: name of the run.
        method: name of the method.
        sites: the weights that are followed.
        finish: waits for the changes and returns them, one a site.
        total_decay: Λ up to this step, by tensor.
        effective: the effective weights, by tensor, where weights are kept.
        baseline: W_0 by tensor, where it is still to be kept.
    """

    step: int
    run: str
    method: str
    sites: Sequence[Site]
    finish: Callable[[], list[Measured]]
    total_decay: Mapping[str, float]
    effective: Mapping[str, EffectiveWeight]
    baseline: Mapping[str, Tensor] | None

    def rows(self, changes: Sequence[Measured]) -> list[dict[str, object]]:
        """The rows of the table, one a site."""
        return [
            trajectory_row(
                site,
                change.summary,
                run=self.run,
                method=self.method,
                step=self.step,
                total_decay=self.total_decay[site.tensor],
                head=site.head,
            )
            for site, change in zip(self.sites, changes, strict=True)
        ]

    def keep(self, directory: Path, kinds: Collection[str], changes: Sequence[Measured]) -> None:
        """Write the files that are kept beside the table: of these kinds, "units" and "weights"."""
        if "weights" in kinds:
            if self.baseline is not None:
                snapshots.save_baseline(directory, self._by_site(self.baseline))
            snapshots.save_weights(directory, self.step, self._by_site(self.effective))
        if "units" in kinds:
            units = {
                site: change.units
                for site, change in zip(self.sites, changes, strict=True)
                if change.units is not None
            }
            snapshots.save_units(directory, self.step, units)

    def _by_site(self, tensors: Mapping[str, T]) -> dict[Site, T]:
        return {site: tensors[site.tensor] for site in self.sites if site.tensor in tensors}
