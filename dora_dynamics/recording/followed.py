"""Where a followed tensor lives in a model, and how to read it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_dynamics.adapters import LoRA
from dora_dynamics.effective import (
    Dense,
    EffectiveWeight,
    acting_layer,
    at_a_glance,
    base_weight,
    dense_weight,
    is_merged,
    magnitude_parameter,
    method_of,
    quantization_below,
    read_dense,
    read_effective,
    stored_parameter,
)
from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import Tensor, nn

    from dora_dynamics.sites import Site

    Seen = tuple[Tensor | None, nn.Parameter | LoRA | None]


@dataclass(frozen=True)
class Followed:
    """One tensor of a live model: the module that holds it and the name it has there."""

    module: nn.Module
    parameter: str

    def stored(self) -> Tensor | None:
        """W_0 as the module holds it, None where it holds what computes it; not detached."""
        return stored_parameter(self.module, self.parameter)

    def seen(self) -> Seen:
        """What `stored` returns, and what is seen of the tensor at a glance."""
        known = at_a_glance(self.module, self.parameter)
        if known is None or isinstance(known, LoRA):
            return self.stored(), known
        return known, known

    def base(self) -> Tensor:
        """What lies below any adapter at this moment, decoded where it is quantised; detached."""
        return base_weight(self.module, self.parameter)

    def effective(self, *, probe: bool = False) -> EffectiveWeight:
        """What the module applies at this moment, by an adapter's factors where it has them.

        The checks of a dense weight are not looked at yet; `probe` as in `read_effective`.
        """
        return read_effective(self.module, self.parameter, probe=probe)

    def effective_dense(self, *, probe: bool = False) -> Dense:
        """As `effective`, in full."""
        return read_dense(self.module, self.parameter, probe=probe)

    def dense(self) -> Tensor:
        """What the module applies at this moment, as one tensor, detached."""
        return dense_weight(self.module, self.parameter)

    def magnitude(self) -> Tensor | None:
        """The parameter whose weight decay shrinks the magnitude, None where that is not known."""
        return magnitude_parameter(self.module, self.parameter)

    def shape(self) -> torch.Size | None:
        """Shape of the tensor, None where only computing it would tell."""
        stored = self.stored()
        return None if stored is None else stored.shape

    def is_merged(self) -> bool:
        """Whether an adapter is merged into the weight below it."""
        return is_merged(self.module)

    def quantization(self) -> str | None:
        """What the weight below any adapter is quantised as; None where it is not."""
        return quantization_below(self.module) if self.parameter == "weight" else None

    def method(self) -> str | None:
        """Name of the method that trains the tensor: "FT" where the module itself holds it."""
        return "FT" if self.parameter in self.module._parameters else method_of(self.module)

    def is_left_alone(self) -> bool:
        """Whether nothing trains the tensor: it is frozen and carries no adapter."""
        if self.method() != "FT":
            return False
        stored = self.stored()
        return stored is not None and not stored.requires_grad


class MagnitudeParameters:
    """`Followed.magnitude` of each tensor, remembered from step to step: to look costs more.

    One is looked up again where it got no gradient though it trained, or trains though it was
    frozen: an adapter was switched or merged. `forget` has all looked up again.
    """

    def __init__(self, followed: Mapping[str, Followed]) -> None:
        """Remember nothing yet of these tensors."""
        self._followed = followed
        self._known: dict[str, tuple[Tensor, bool]] = {}

    def forget(self) -> None:
        """Look all of them up again, the next time."""
        self._known.clear()

    def of(self, name: str) -> Tensor | None:
        """The parameter of the tensor of that name, after an optimizer's step."""
        parameter, frozen = self._known.get(name, (None, False))
        if parameter is not None and (
            not parameter.requires_grad if frozen else parameter.grad is not None
        ):
            return parameter
        found = self._followed[name].magnitude()
        if found is not None:
            self._known[name] = found, not found.requires_grad
        return found


def follow(model: nn.Module, sites: Iterable[Site]) -> dict[str, Followed]:
    """The tensors behind `sites`, each once, by `Site.tensor`."""
    return {
        site.tensor: Followed(*acting_layer(model, site.module, site.parameter)) for site in sites
    }


def common_method(followed: Mapping[str, Followed]) -> str:
    """The method that trains all of these tensors, but for frozen ones that carry no adapter.

    Raises:
        InputError: they are trained by several methods, or by one that has no known name.
    """
    trained = [tensor for tensor in followed.values() if not tensor.is_left_alone()]
    found = {tensor.method(): tensor for tensor in trained}
    if None in found:
        kind = type(found[None].module).__name__
        raise InputError(f"the method of a {kind} has no known name: give it one by method=.")
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise InputError(f"the followed weights have several methods ({names}): pass method=.")
    return next(map(str, found), "FT")
