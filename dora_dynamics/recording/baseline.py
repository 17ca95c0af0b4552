"""The right W_0 of what a recorder follows, kept right while the model moves and trains.

Three ways lead to it (`baseline_source`). Taken from the model, where the weight below an adapter
is still what it was; captured before the adapter is applied; or read, weight by weight, from the
pre-trained checkpoint.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Literal, get_args

import torch

from dora_dynamics._arrays import are_any_sharded, is_sharded
from dora_dynamics.adapters import LoRA
from dora_dynamics.effective import (
    Dense,
    EffectiveWeight,
    NoDenseWeightError,
    by_factors,
    version_of,
)
from dora_dynamics.effective.peft_layers import refuse_model
from dora_dynamics.errors import InputError
from dora_dynamics.recording.baseline_source import BaselineError, given_weights, refuse_rewritten
from dora_dynamics.recording.memory import (
    are_alike,
    as_loaded,
    in_host_memory,
    share_memory,
)
from dora_dynamics.recording.optimizers import is_frozen
from dora_dynamics.recording.quantization import (
    error_beside_update,
    quantized,
    with_quantization,
)
from dora_dynamics.recording.shared_weights import SharedWeights
from dora_dynamics.recording.troubles import warn_user
from dora_dynamics.sharded import Adapted, ShardingError
from dora_dynamics.sharded.models import expose

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed.tensor import DTensor
    from torch.optim import Optimizer

    from dora_dynamics.recording.baseline_source import CapturedBaseline
    from dora_dynamics.recording.followed import Followed, Seen
    from dora_dynamics.runs.directory import StrPath
    from dora_dynamics.sites import Site


Place = Literal["device", "host", "file"]
"""Where W_0 waits between measurements; see `Recorder`."""


_WITHOUT_VALUES: Final = (
    "{} had no values when the recorder was made (it was on the meta device): make it after the "
    "weights are loaded, or pass baseline=."
)


class Baselines:
    """W_0 of every followed tensor, and what is to be measured against it.

    A frozen weight of the model is not copied: while it is W_0, LoRA and DoRA are measured by
    their factors alone.

    Attributes:
        weights: W_0 by `Site.tensor`, as the module stores it.
        description: what W_0 is and where it came from, for `run.json`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        followed: Mapping[str, Followed],
        source: StrPath | Mapping[str, Tensor] | CapturedBaseline | None = None,
        place: Place = "device",
    ) -> None:
        """Take W_0 from `source`, or from the model as it is, and keep it at `place`.

        Raises:
            InputError: there is no such place, or `source` is no file and W_0 is to stay in it.
            BaselineError: the source lacks a weight or holds one of another shape, or the model's
                own base weights are not W_0.
            CheckpointError: the checkpoint cannot be read.
            NoDenseWeightError: a followed module has no dense weight.
        """
        if place not in get_args(Place):
            raise InputError(f"baseline_place must be 'device', 'host' or 'file', not {place!r}.")
        if place == "file" and not isinstance(source, (str, os.PathLike)):
            raise InputError(
                "baseline_place='file' leaves W_0 in its checkpoint: say with baseline= which."
            )
        refuse_model(model)
        self._place: Place = place
        self._followed = followed
        self._shared = SharedWeights()
        self._probed: set[str] = set()
        self._seen: dict[str, Seen] | None = None
        self._quantized = quantized(followed)
        if source is None:
            refuse_rewritten(model, followed)
            self.description = "the model's own weights when the recorder was made"
            self.weights = {name: self._own(name) for name in followed}
        else:
            given, self.description = given_weights(source, sites)
            self.weights = {name: given[name].detach() for name in followed}
            self._check_shapes()
            self._copy_live(followed)
        self._given = source is not None
        if self._quantized:
            kinds, is_given = self._quantized.values(), self._given
            self.description = with_quantization(self.description, kinds, is_given=is_given)

    def settle(self, followed: Mapping[str, Followed]) -> None:
        """Adapt to what happened since: adapters applied, the model moved or its dtype changed.

        Args:
            followed: where the tensors live now.
        """
        self._followed = followed
        sharded: dict[str, DTensor] = {}
        for name, where in followed.items():
            stored, weight = where.stored(), self.weights[name]
            if stored is None or weight is stored:
                continue
            self._shared.discard(name)
            if is_sharded(stored):
                sharded[name] = stored
                continue
            if is_sharded(weight):
                raise ShardingError(
                    f"{name} was sharded when its baseline was taken and is whole now: attach the "
                    "recorder to the model as it was sharded then."
                )
            if weight.is_meta:
                raise BaselineError(_WITHOUT_VALUES.format(name))
            self.weights[name] = weight = self._placed(weight, stored)
            if is_frozen(stored):
                here = weight.to(stored.device, as_loaded(weight, stored))
                if here.dtype == stored.dtype and torch.equal(here, stored):
                    self._share(name, stored)
                    continue
            if share_memory(weight, stored):
                self.weights[name] = self._taken(weight)
        if sharded:
            self._settle_sharded(sharded)

    @property
    def is_sharded(self) -> bool:
        """Whether several processes hold a followed weight together, each a part of it."""
        return are_any_sharded(self.weights.values()) or are_any_sharded(self._all_stored())

    @property
    def is_together(self) -> bool:
        """Whether processes measure together, as they all know since `settle`: W_0 is sharded."""
        return are_any_sharded(self.weights.values())

    def _settle_sharded(self, sharded: Mapping[str, DTensor]) -> None:
        """Shard W_0 as the live weights are; every process is here."""
        from dora_dynamics.sharded.baseline import all_equal, settled

        if self._place != "device" and any(w.device.type != "cpu" for w in sharded.values()):
            raise ShardingError(
                f"baseline_place={self._place!r}: W_0 of a sharded weight is sharded like it, and "
                "stays on the device; leave that argument out."
            )
        for name, weight in settled(self.weights, sharded).items():
            self.weights[name] = weight.to(as_loaded(weight, sharded[name]))
        frozen = {name: stored for name, stored in sharded.items() if is_frozen(stored)}
        for name in all_equal(self.weights, frozen):
            self._share(name, frozen[name])

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Take W_0 from these tensors, by `Site.tensor`, where they are not the present ones."""
        for name, weight in weights.items():
            if weight is not self.weights[name]:
                self.weights[name] = weight
                self._shared.discard(name)
        if self.is_sharded:
            self.settle(self._followed)

    def confirm(self) -> None:
        """Take frozen weights for W_0 as they are now: what was written to them was checked."""
        for name in self._shared:
            self._share(name, self.weights[name])

    @property
    def is_watchful(self) -> bool:
        """Whether `before_step` has anything to look at."""
        return bool(self._shared)

    def before_step(self, optimizer: Optimizer) -> None:
        """Copy each W_0 that is the live parameter, frozen until now, before it trains."""
        for name in self._shared.about_to_train(optimizer):
            self._tell_if_changed(name)
            self.weights[name] = self._taken(self.weights[name])
            self._shared.discard(name)

    def _copy_live(self, followed: Mapping[str, Followed]) -> None:
        """Copy of W_0 as it was given what lies in memory that trains, as `state_dict()` does."""
        for name, where in followed.items():
            stored, weight = where.stored(), self.weights[name]
            if stored is not None and not is_frozen(stored) and share_memory(weight, stored):
                self.weights[name] = self._taken(weight)

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """Look each live weight up once while this lasts, in which nobody changes the model."""
        self._seen = {}
        try:
            yield
        finally:
            self._seen = None

    def expose(self, model: nn.Module) -> None:
        """Where weights are sharded, see to it that the model's parameters are these shards."""
        if self.is_sharded:
            expose(model)
            if self._seen is not None:
                self._seen.clear()

    def _look(self, name: str) -> Seen:
        seen = self._seen
        if seen is None:
            return self._followed[name].seen()
        if name not in seen:
            seen[name] = self._followed[name].seen()
        return seen[name]

    def _all_stored(self) -> list[Tensor | None]:
        seen = self._seen or {}
        if len(seen) == len(self._followed):
            return [seen[name][0] for name in self._followed]
        return [self._look(name)[0] for name in self._followed]

    def pair(self, name: str) -> tuple[Tensor, EffectiveWeight | Adapted]:
        """W_0 and the effective weight of a tensor at this moment, fit to be compared.

        By its factors only where W_0 is the very base below them.

        Raises:
            BaselineError: the base weight that was W_0 has been merged into, or the weight has
                another shape by now, or no values.
        """
        where, weight = self._followed[name], self.weights[name]
        if weight.is_meta:
            raise BaselineError(_WITHOUT_VALUES.format(name))
        if name in self._shared:
            self._check_unchanged(name)
        stored, known = self._look(name)
        if known is not None and known is stored and are_alike(weight, stored):
            return weight, Dense(stored.detach())
        is_base = name in self._shared or (name in self._quantized and not self._given)
        if is_sharded(weight):
            return weight, self._sharded_weight(name, is_base=is_base)
        if is_base and isinstance(known, LoRA):
            return weight, by_factors(known)
        probe = name in self._probed
        effective = where.effective(probe=probe) if is_base else where.effective_dense(probe=probe)
        if not isinstance(effective, Dense):
            return weight, effective
        now = effective.weight
        if is_sharded(now):
            raise ShardingError(
                f"{name} was whole when its baseline was taken and is sharded now: make the "
                "recorder after the model is sharded."
            )
        if now.is_meta:
            raise BaselineError(f"{name} has lost its values: it is on the meta device.")
        if now.shape != weight.shape:
            raise BaselineError(
                f"{name} has the shape {tuple(now.shape)} now, and its baseline "
                f"{tuple(weight.shape)}: make the recorder after weights are resized."
            )
        loaded = weight.dtype if stored is None else as_loaded(weight, stored)
        common = torch.promote_types(loaded, now.dtype)
        here = weight.to(now.device, non_blocking=weight.device.type == "cpu")
        return here.to(loaded).to(common), Dense(now.to(common), effective.checks)

    def probe(self, names: Iterable[str]) -> None:
        """Read the effective weights of these tensors by probing from now on."""
        self._probed.update(names)

    def passing_bytes(self, name: str, weight: Tensor, effective: EffectiveWeight | Adapted) -> int:
        """Bytes of what `pair` returned that are in memory only to be measured."""
        size = 0 if weight is self.weights[name] else weight.nbytes
        if isinstance(effective, Dense):
            stored, _ = self._look(name)
            if stored is None or stored.dtype != effective.weight.dtype:  # not the module's own
                size += effective.weight.nbytes
        return size

    @property
    def is_on_gpu(self) -> bool:
        """Whether weights are measured on a GPU, which works while the host goes on."""
        return "cuda" in self.device_types

    @property
    def device_types(self) -> set[str]:
        """Where weights are measured: "cuda", "cpu" and so on."""
        try:
            stored = self._all_stored()
        except Exception:  # of which weight, `pair` tells
            stored = [None] * len(self._followed)
        pairs = zip(self._followed, stored, strict=True)
        living = [self.weights[name] if found is None else found for name, found in pairs]
        return {device.type for device in set(map(attrgetter("device"), living))} - {"meta"}

    def _sharded_weight(self, name: str, *, is_base: bool) -> EffectiveWeight | Adapted:
        """The effective weight of a sharded tensor, by an adapter's factors where it has one."""
        where = self._followed[name]
        stored, _ = self._look(name)
        try:
            effective = where.effective()
        except NoDenseWeightError as error:
            raise NoDenseWeightError(f"{name} cannot be followed: {error}.") from error
        if isinstance(effective, Dense) and effective.weight.is_meta:
            raise BaselineError(f"{name} has lost its values: it is on the meta device.")
        if is_sharded(stored) and not (isinstance(effective, Dense) or is_base):
            return Adapted(stored, effective)
        return effective

    def quantization_report(self) -> str | None:
        """How the quantisation error of the base compares with the update; None if not known.

        Known where W_0 was given.
        """
        if not self._given or not self._quantized:
            return None
        return error_beside_update(self._quantized, self._followed, self.weights)

    def _own(self, name: str) -> Tensor:
        where = self._followed[name]
        stored = where.stored()
        if stored is None:
            return where.base().clone()
        if not is_frozen(stored):
            return self._taken(stored)
        self._share(name, stored)
        return stored

    def _taken(self, stored: Tensor) -> Tensor:
        """A copy of a weight that trains, where W_0 is kept."""
        if self._place == "device" or stored.device.type == "cpu":
            return stored.detach().clone()
        return in_host_memory(stored.detach(), stored.device)

    def _placed(self, weight: Tensor, stored: Tensor) -> Tensor:
        """W_0 of a live weight, where it is kept."""
        if self._place == "file":
            return weight
        weight = weight.to(as_loaded(weight, stored))
        if self._place == "host":
            return in_host_memory(weight, stored.device)
        return weight.to(stored.device)

    def _share(self, name: str, stored: Tensor) -> None:
        self._shared.add(name, stored, version_of(self._followed[name].module, stored))
        if hasattr(self, "weights"):
            self.weights[name] = stored

    def _check_unchanged(self, name: str) -> None:
        stored, at_a_glance = self._look(name)
        if at_a_glance is None and self._followed[name].is_merged():
            raise BaselineError(
                f"the adapter of {name} has been merged into its base weight, which was W_0: "
                "unmerge it before a recorded step, or make the recorder with "
                "baseline=dora_dynamics.capture_baseline(model, targets)."
            )
        weight = self.weights[name]
        if stored is weight:
            self._tell_if_changed(name)
            return
        self._shared.discard(name)  # it has a new weight, and the old one is still W_0
        if stored is not None and share_memory(weight, stored):
            self.weights[name] = self._taken(weight)

    def _tell_if_changed(self, name: str) -> None:
        """Warn where a weight that is W_0 was written to; what it is now is W_0 from here on."""
        weight, known = self.weights[name], self._shared.version(name)
        if weight._version != known != version_of(self._followed[name].module, weight):
            warn_user(
                f"the frozen weight of {name} was changed in place after the recorder was made, "
                "and is W_0 as it is now; make the recorder after the weights are loaded, and "
                "attach it to all optimizers."
            )
            self._share(name, weight)

    def _check_shapes(self) -> None:
        for name, weight in self.weights.items():
            expected = self._followed[name].shape()
            if expected is not None and weight.shape != expected:
                raise BaselineError(
                    f"the baseline's {name} has the shape {tuple(weight.shape)} and the model's "
                    f"{tuple(expected)}: give the checkpoint this model was made from."
                )
