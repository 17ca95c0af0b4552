"""Measuring a step: all weights together, each with what must hold of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

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
    from dora_dynamics.sharded.together import Together
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
        together: of sharded weights, what the processes agreed on.
        failure: why this process can measure nothing; others are told, and wait for nothing.
    """

    sites: Sequence[Site]
    baseline: Baselines
    axis: Axis
    keep: frozenset[str]
    spare: bool
    together: Together
    failure: Exception | None = None

    def queue(
        self,
    ) -> tuple[Callable[[], list[Measured]], dict[str, EffectiveWeight], Mapping[str, Exception]]:
        """Start to measure the change at every site; what is measured comes in one transfer.

        Where weights come with checks, these come in the same transfer and are waited for: what
        was not the weight that its module applies is probed from then on, and all is measured
        again.

        Where weights are sharded, all processes call this, and what one of them cannot measure of
        these, none has numbers of. Without `spare` all of them raise.

        Returns:
            What waits for the changes, and by `Site.tensor` the effective weights where they are
            kept and, with `spare`, why some were not measured.

        Raises:
            NoDenseWeightError: a module applies no one weight.
        """
        whole: dict[str, list[Site]] = {}
        sharded: dict[str, list[Site]] = {}
        for site in self.sites:
            is_part = is_sharded(self.baseline.weights[site.tensor])
            (sharded if is_part else whole).setdefault(site.tensor, []).append(site)
        with full_precision(self.baseline.device_types):
            try:
                measured, effective, failed = self._whole(whole)
            except Exception as error:
                if not sharded:
                    raise
                measured, effective, failed = dict, {}, dict.fromkeys(whole, error)
            if sharded:  # whatever failed: the other processes are there
                measured_together, its_failed = self._sharded(sharded, failed)
                failed |= its_failed
        for name in failed:
            effective.pop(name, None)

        def finish() -> list[Measured]:
            changes = measured() | (measured_together() if sharded else {})
            return [
                self._unmeasured(site) if site.tensor in failed else changes[site]
                for site in self.sites
            ]

        return finish, effective, failed

    def _unmeasured(self, site: Site) -> Measured:
        shape = self.baseline.weights[site.tensor].shape
        return Measured(unmeasured(site.units(shape, self.axis)), None)

    def _sharded(
        self, tensors: Mapping[str, Sequence[Site]], failed: Mapping[str, Exception]
    ) -> tuple[Callable[[], dict[Site, Measured]], dict[str, Exception]]:
        """Measure the sharded weights with all other processes.

        Args:
            tensors: them, with their sites.
            failed: which others this process could not measure.
        """
        from dora_dynamics.sharded.adapted import Weight

        weights = []
        for name, sites in tensors.items():
            before: Any = self.baseline.weights[name]
            after: EffectiveWeight | Adapted | Exception
            try:
                if self.failure is not None:
                    raise self.failure
                _, after = self.baseline.pair(name)
            except Exception as error:
                after = error
            weights.append(Weight(tuple(sites), before, after))
        found, elsewhere = self.together.changes(weights, self.axis, failed=bool(failed))
        its_failed: dict[str, Exception] = {}
        its_sites: list[Site] = []
        measurement = Measurement(self.axis, keep_units="units" in self.keep)
        for (name, sites), changes in zip(tensors.items(), found, strict=True):
            if isinstance(changes, Exception):
                its_failed[name] = changes
            else:
                measurement.add_measured(changes)
                its_sites += sites
        failures = [*failed.values(), *its_failed.values()]
        if elsewhere is not None:
            failures.append(elsewhere)
        if failures and not self.spare:
            raise failures[0]
        measurement.start()
        return lambda: dict(zip(its_sites, measurement.finish(), strict=True)), its_failed

    def _whole(
        self, tensors: Mapping[str, Sequence[Site]]
    ) -> tuple[
        Callable[[], dict[Site, Measured]], dict[str, EffectiveWeight], dict[str, Exception]
    ]:
        """Start to measure the weights that this process has as a whole, and look at their checks.

        Returns:
            What waits for the changes, the weights that are kept and, with `spare`, what failed.
        """
        if self.failure is not None:
            raise self.failure
        while True:
            measurement, added, effective, failed = self._begun(tensors)
            wrong = measurement.failed_checks()
            to_probe: set[str] = set()
            for check in wrong:
                checked = {site.tensor for site, checks in added if check in checks}
                if check.by_probing:
                    to_probe |= checked
                elif self.spare:
                    failed |= dict.fromkeys(checked, check.otherwise)
                else:
                    raise check.otherwise
            if not to_probe:
                break
            self.baseline.probe(to_probe)

        def finish() -> dict[Site, Measured]:
            sites = (site for site, _ in added)
            return dict(zip(sites, measurement.finish(), strict=True))

        return finish, effective, failed

    def _begun(
        self, tensors: Mapping[str, Sequence[Site]]
    ) -> tuple[
        Measurement,
        list[tuple[Site, tuple[Check, ...]]],
        dict[str, EffectiveWeight],
        dict[str, Exception],
    ]:
        """A started measurement, its sites with their checks, and the weights that are kept.

        With `spare` also what failed, by tensor.

        All weights are measured together, but for those that must be copied or computed first:
        of these, so many that they take `_AT_A_TIME` bytes, or one that takes more.
        """
        kept: dict[str, EffectiveWeight] = {}
        added: list[tuple[Site, tuple[Check, ...]]] = []
        together: list[Triple] = []
        passing = 0
        failed: dict[str, Exception] = {}
        measurement = Measurement(self.axis, keep_units="units" in self.keep)

        def add_these(triples: Sequence[Triple]) -> None:
            measurement.add(triples)
            added.extend((site, checks_of(effective)) for site, _, effective in triples)

        def add() -> None:
            nonlocal passing
            try:
                add_these(together)
            except Exception:
                if not self.spare:
                    raise
                for name, its_own in groupby(together, key=lambda triple: triple[0].tensor):
                    try:
                        add_these(list(its_own))
                    except Exception as error:
                        failed[name] = error
            together.clear()
            passing = 0

        for name, its_sites in tensors.items():
            try:
                weight, effective = self.baseline.pair(name)
            except Exception as error:
                if not self.spare:
                    raise
                failed[name] = error
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
        measurement.start()
        return measurement, added, kept, failed
