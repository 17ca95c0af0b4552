"""Where a followed tensor lives in a model, and how to read it there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch.nn.utils import parametrize

from dora_dynamics.effective import (
    Dense,
    EffectiveWeight,
    dense_weight,
    effective_weight,
    magnitude_parameter,
    stored_parameter,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from dora_dynamics.sites import Site


@dataclass(frozen=True)
class Followed:
    """One tensor of a live model: the module that holds it and the name it has there.

    A module's `weight` may carry an adapter, and is read as `effective` says. Any other parameter
    (a bias, the experts of a layer) is what the module holds.
    """

    module: nn.Module
    parameter: str

    def stored(self) -> Tensor | None:
        """W_0 as the module holds it, None where it holds what computes it; not detached."""
        if self.parameter == "weight":
            return stored_parameter(self.module)
        if parametrize.is_parametrized(self.module, self.parameter):
            return None
        return self._plain()

    def effective(self) -> EffectiveWeight:
        """What the module applies at this moment, by an adapter's factors where it has them."""
        if self.parameter == "weight":
            return effective_weight(self.module)
        return Dense(self._plain().detach())

    def dense(self) -> Tensor:
        """What the module applies at this moment, as one tensor, detached."""
        if self.parameter == "weight":
            return dense_weight(self.module)
        return self._plain().detach()

    def magnitude(self) -> Tensor | None:
        """The parameter whose weight decay shrinks the magnitude, None where that is not known."""
        if self.parameter == "weight":
            return magnitude_parameter(self.module)
        return self.stored()

    def _plain(self) -> Tensor:
        return cast("Tensor", getattr(self.module, self.parameter))


def follow(model: nn.Module, sites: Iterable[Site]) -> dict[str, Followed]:
    """The tensors behind `sites`, each once, by `Site.tensor`."""
    return {
        site.tensor: Followed(model.get_submodule(site.module), site.parameter) for site in sites
    }
