"""Λ = Σ lr · weight_decay of every followed tensor, added up with next to no work a step.

From step to step hardly anything changes but the rates: the same parameters are in the same groups,
and those that trained train. That is checked at every step, by loops that run in C, and where it
holds a step adds one number for all tensors of a group that have come as far. Where it does not,
each tensor's parameter is looked at, and what is found holds from then on.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING

from dora_dynamics.recording.followed import MagnitudeParameters
from dora_dynamics.recording.optimizers import (
    GRADIENT,
    REQUIRES_GRAD,
    decays,
    has_no_gradient,
    share_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from dora_dynamics.recording.followed import Followed


class TotalDecay:
    """Λ of every followed tensor up to now; NaN where it is not known, and from then on."""

    def __init__(self, totals: Mapping[str, float], followed: Mapping[str, Followed]) -> None:
        """Go on from these totals; the tensors live where `followed` says."""
        self._totals = dict(totals)
        self._magnitudes = MagnitudeParameters(followed)
        self._parameters: list[Tensor | None] = []
        self._looks_again = False
        self._routines: dict[int, _Routine] = {}
        self._groups: dict[int, list[list[Tensor]]] = {}

    def totals(self) -> dict[str, float]:
        """Λ up to now, by tensor."""
        for routine in self._routines.values():
            routine.add_to(self._totals)
        return dict(self._totals)

    def let_go(self) -> None:
        """Hold no parameter any longer than the optimizers are watched."""
        self._forget(list(self._routines))
        self._magnitudes.forget()
        self._parameters = []
        self._groups.clear()

    def look_again(self) -> None:
        """Look up anew which parameters carry the magnitudes, at the next step."""
        self._looks_again = True

    def add(self, optimizer: Optimizer) -> None:
        """Add the weight decay of the step that an optimizer has just made.

        Raises:
            Exception: what a foreign optimizer or module raises.
        """
        looks_again = self._looks_again and decays(optimizer)
        if looks_again:
            self._look_again()
        routine = self._routines.get(id(optimizer))
        if routine is not None and routine.holds(optimizer, self._magnitudes):
            routine.add_step(optimizer)
        elif decays(optimizer):
            self._look_at_each(optimizer, looked_again=looks_again)

    def _look_again(self) -> None:
        """Forget what does not hold where a magnitude has another parameter by now."""
        self._looks_again = False
        self._magnitudes.forget()
        before, self._parameters = self._parameters, self._looked_up()
        same = len(before) == len(self._parameters)
        if not (same and all(map(operator.is_, before, self._parameters))):
            self._forget(list(self._routines))

    def _looked_up(self) -> list[Tensor | None]:
        """The parameter of each tensor of which Λ is known, in order."""
        return [self._magnitudes.of(n) for n, total in self._totals.items() if total == total]

    def _look_at_each(self, optimizer: Optimizer, *, looked_again: bool) -> None:
        self._forget([id(optimizer)])
        groups = [list(group["params"]) for group in optimizer.param_groups]
        if not _are_same(groups, self._groups.get(id(optimizer), [])):
            if not looked_again:
                self._magnitudes.forget()  # what is new may be in a followed tensor's place
            self._groups[id(optimizer)] = groups
        group_of = {
            id(parameter): i for i, parameters in enumerate(groups) for parameter in parameters
        }
        shares = [share_of(optimizer, group) for group in optimizer.param_groups]
        known = [name for name, total in self._totals.items() if total == total]
        self._parameters = self._looked_up()
        added: dict[str, float] = {}
        decayed: dict[str, int] = {}
        for name, parameter in zip(known, self._parameters, strict=True):
            if parameter is None:
                added[name] = math.nan
            elif (group := group_of.get(id(parameter))) is not None and parameter.grad is not None:
                decayed[name] = group
                if shares[group]:
                    added[name] = shares[group]
        taken = {**added, **decayed}
        self._forget([i for i, other in self._routines.items() if other.names & taken.keys()])
        for name, share in added.items():
            self._totals[name] += share
        if len(group_of) == sum(map(len, groups)):
            present = dict(zip(known, self._parameters, strict=True))
            self._routines[id(optimizer)] = _routine(
                groups, present, decayed, group_of, self._totals
            )

    def _forget(self, optimizers: Sequence[int]) -> None:
        for one in optimizers:
            routine = self._routines.pop(one, None)
            if routine is not None:
                routine.add_to(self._totals)


@dataclass(eq=False)
class _Sum:
    """Λ of tensors that have come equally far and are decayed by the same group."""

    total: float
    names: list[str]


@dataclass(frozen=True, eq=False)
class _Routine:
    """What an optimizer's step takes off which tensors, as long as nothing changes.

    Attributes:
        groups: the parameters of each group.
        trained: the magnitudes that train: they have gradients.
        frozen: those that do not.
        passed_over: of these, those that the optimizer has, and steps over.
        idle: those that could train, but have no gradient: another may train in their place.
        sums: Λ of the tensors that it decays, by group.
        names: these tensors.
    """

    groups: list[list[Tensor]]
    trained: list[Tensor]
    frozen: list[Tensor]
    passed_over: list[Tensor]
    idle: dict[str, Tensor]
    sums: dict[int, list[_Sum]]
    names: frozenset[str]

    def holds(self, optimizer: Optimizer, magnitudes: MagnitudeParameters) -> bool:
        """Whether all is as it was; each parameter is asked, but for what it holds."""
        groups = [group["params"] for group in optimizer.param_groups]
        return (
            _are_same(groups, self.groups)
            and not any(map(operator.is_, map(GRADIENT, self.trained), repeat(None)))
            and not any(map(REQUIRES_GRAD, self.frozen))
            and has_no_gradient(self.passed_over)
            and all(
                parameter.grad is None and magnitudes.of(name) is parameter
                for name, parameter in self.idle.items()
            )
        )

    def add_step(self, optimizer: Optimizer) -> None:
        """Add what the optimizer's step has taken."""
        for group, sums in self.sums.items():
            share = share_of(optimizer, optimizer.param_groups[group])
            for one in sums:
                one.total += share

    def add_to(self, totals: dict[str, float]) -> None:
        """Write down how far the tensors have come."""
        for one in chain(*self.sums.values()):
            totals.update(dict.fromkeys(one.names, one.total))


def _are_same(groups: Sequence[Sequence[Tensor]], others: Sequence[Sequence[Tensor]]) -> bool:
    """Whether these groups have the same parameters; loops that run in C."""
    return (
        len(groups) == len(others)
        and all(map(operator.eq, map(len, groups), map(len, others)))
        and all(map(operator.is_, chain(*groups), chain(*others)))
    )


def _routine(
    groups: list[list[Tensor]],
    parameters: Mapping[str, Tensor | None],
    decayed: Mapping[str, int],
    group_of: Mapping[int, int],
    totals: Mapping[str, float],
) -> _Routine:
    """What holds at this step of tensors whose Λ is known, until it is found not to hold."""
    sums: dict[int, dict[float, _Sum]] = {}
    trained, frozen, passed_over, idle = [], [], [], {}
    for name, parameter in parameters.items():
        total = totals[name]
        if parameter is None or total != total:
            continue
        if name in decayed:
            equal = sums.setdefault(decayed[name], {})
            equal.setdefault(total, _Sum(total, [])).names.append(name)
        has_gradient = parameter.grad is not None
        if has_gradient:
            trained.append(parameter)
        elif parameter.requires_grad:
            idle[name] = parameter
        else:
            frozen.append(parameter)
            if id(parameter) in group_of:
                passed_over.append(parameter)
    return _Routine(
        groups=groups,
        trained=trained,
        frozen=frozen,
        passed_over=passed_over,
        idle=idle,
        sums={group: list(equal.values()) for group, equal in sums.items()},
        names=frozenset(n for equal in sums.values() for one in equal.values() for n in one.names),
    )
