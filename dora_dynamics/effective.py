"""The weight a module really applies, adapters included, and the pre-trained one behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.utils import parametrize

from dora_dynamics.adapters import DoRA, adapter_of, pretrained_weight

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Dense:
    """A full effective weight W', stored as the module stores it."""

    weight: Tensor


@dataclass(frozen=True)
class LowRank:
    """A LoRA or DoRA weight by its factors: W_0 is known, and the rest is rank-sized.

    Attributes:
        A: shape (rank, in).
        B: shape (out, rank).
        scaling: the factor on B A.
        magnitude: DoRA's m, shape (out,), or None for LoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None


EffectiveWeight = Dense | LowRank


def effective_weight(module: nn.Module) -> EffectiveWeight:
    """What `module` multiplies by at this moment; tensors are detached, nothing is copied.

    LoRA and DoRA of this package are given by their factors, so that W' need not be built; any
    other parametrization, and a plain module, by `module.weight`.
    """
    adapter = adapter_of(module)
    if adapter is None:
        with torch.no_grad():
            return Dense(cast("Tensor", module.weight).detach())
    magnitude = adapter.magnitude.detach() if isinstance(adapter, DoRA) else None
    return LowRank(adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.scaling, magnitude)


def stored_parameter(module: nn.Module) -> Tensor:
    """The parameter behind `module.weight`: itself, or the original below a parametrization."""
    if parametrize.is_parametrized(module, "weight"):
        return pretrained_weight(module)
    return cast("Tensor", module.weight)


def magnitude_parameter(module: nn.Module) -> Tensor:
    """The parameter whose weight decay shrinks the magnitude: m in DoRA, else the stored weight."""
    adapter = adapter_of(module)
    return adapter.magnitude if isinstance(adapter, DoRA) else stored_parameter(module)
