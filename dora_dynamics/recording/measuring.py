"""Measuring a step: all weights together, each with what must hold of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from dora_dynamics._arrays import is_sharded
from dora_dynamics._precision import full_precision
from dora_dynamics.measurement import Measured, Measurement, checks_of
from dora_dynamics.sharded import Adapted
from dora_dynamics.units.summary import unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dora_dynamics.decomposition import Axis
    from dora_dynamics.effective import Check, EffectiveWeight
    from dora_dynamics.measurement import Triple
    from dora_dynamics.recording.baseline import Baselines
    from dora_dynamics.sites import Site

_AT_A_TIME: Final = 1 << 28
"""Bytes of weights that are copied or computed only to be measured, in memory together."""


@dataclass(frozen=True)
class Measuring:
    """What of a step is to be measured.

    Attributes:
        sites: the weights that are followed.
        baseline: what they are measured against.
        axis: which axis the units are.
        keep: what is kept of them: "units", "weights".
        spare: give a weight that cannot be measured no numbers, rather than raise.
    """

    sites: Sequence[Site]
    baseline: Baselines
    axis: Axis
    keep: frozenset[str]
    spare: bool

    def queue(
        self,
    ) -> tuple[Callable[[], list[Measured]], dict[str, EffectiveWeight], Mapping[str, Exception]]:
        """Start to measure the change at every site; what is measured comes in one transfer.

        Where weights come with checks, these come in the same transfer and are waited for: what
        was not the weight that its module applies is probed from then on, and all is measured
        again.

        Returns:
            What waits for the changes, and by `Site.tensor` the effective weights where they are
            kept and, with `spare`, why some were not measured.

        Raises:
            NoDenseWeightError: a module applies no one weight.
        """
        with full_precision(self.baseline.device_types):
            while True:
                measurement, added, effective, failed = self._begun()
                wrong = measurement.failed_checks()
                to_probe: set[str] = set()
                for check in wrong:
                    tensors = {site.tensor for site, checks in added if check in checks}
                    if check.by_probing:
                        to_probe |= tensors
                    elif self.spare:
                        failed |= dict.fromkeys(tensors, check.otherwise)
                    else:
                        raise check.otherwise
                if not to_probe:
                    break
                self.baseline.probe(to_probe)
        for name in failed:
            effective.pop(name, None)

        def finish() -> list[Measured]:
            sites = (site for site, _ in added)
            changes = dict(zip(sites, measurement.finish(), strict=True))
            return [
                self._unmeasured(site) if site.tensor in failed else changes[site]
                for site in self.sites
            ]

        return finish, effective, failed

    def _unmeasured(self, site: Site) -> Measured:
        shape = self.baseline.weights[site.tensor].shape
        return Measured(unmeasured(site.units(shape, self.axis)), None)

    def _begun(
        self,
    ) -> tuple[
        Measurement,
        list[tuple[Site, tuple[Check, ...]]],
        dict[str, EffectiveWeight],
        dict[str, Exception],
    ]:
        """A started measurement, its sites with their checks, and the weights that are kept.

        With `spare` also what failed, by tensor; but where processes measure together, that is
        raised: none of them can leave a weight out alone.

        All weights are measured together, but for those that must be copied or computed first:
        of these, so many that they take `_AT_A_TIME` bytes, or one that takes more.
        """
        by_tensor: dict[str, list[Site]] = {}
        for site in self.sites:
            by_tensor.setdefault(site.tensor, []).append(site)
        kept: dict[str, EffectiveWeight] = {}
        added: list[tuple[Site, tuple[Check, ...]]] = []
        together: list[Triple] = []
        apart: list[Triple] = []
        passing = 0
        failed: dict[str, Exception] = {}
        spare = self.spare and not self.baseline.is_sharded
        measurement = Measurement(self.axis, keep_units="units" in self.keep)

        def add_these(triples: Sequence[Triple]) -> None:
            measurement.add(triples)
            added.extend((site, checks_of(effective)) for site, _, effective in triples)

        def add() -> None:
            nonlocal passing
            try:
                add_these(together)
            except Exception:
                if not spare:
                    raise
                for name, its_own in groupby(together, key=lambda triple: triple[0].tensor):
                    try:
                        add_these(list(its_own))
                    except Exception as error:
                        failed[name] = error
            together.clear()
            passing = 0

        for name, its_sites in by_tensor.items():
            try:
                weight, effective = self.baseline.pair(name)
            except Exception as error:
                if not spare:
                    raise
                failed[name] = error
                continue
            if is_sharded(weight):
                apart.extend((site, weight, effective) for site in its_sites)
                continue
            size = measurement.passing_bytes(weight, effective)
            size += self.baseline.passing_bytes(name, weight, effective)
            if passing and passing + size > _AT_A_TIME:
                add()
            passing += size
            together.extend((site, weight, effective) for site in its_sites)
            if "weights" in self.keep and not isinstance(effective, Adapted):
                kept[name] = effective
            del weight, effective
        add()
        if apart:  # all of it by one all-reduce
            together.extend(apart)
            add()
        measurement.start()
        return measurement, added, kept, failed
