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
        return Dense(dense_weight(module))
    magnitude = adapter.magnitude.detach() if isinstance(adapter, DoRA) else None
    return LowRank(adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.scaling, magnitude)


def dense_weight(module: nn.Module) -> Tensor:
    """`module.weight`, detached, read so that reading leaves no trace.

    A parametrization is evaluated in eval mode, since `spectral_norm` would go on with its power
    iteration, and past `parametrize.cached`, which would hand the detached weight to the training.
    """
    if not parametrize.is_parametrized(module, "weight"):
        return cast("Tensor", module.weight).detach()
    stack = cast("nn.ModuleDict", module.parametrizations)["weight"]
    modes = [(part, part.training) for part in stack.modules()]
    stack.eval()
    try:
        with torch.no_grad():
            return cast("Tensor", stack()).detach()
    finally:
        for part, mode in modes:
            part.training = mode


def stored_parameter(module: nn.Module) -> Tensor | None:
    """W_0 as the module holds it: its weight, or what lies below a LoRA or DoRA of this package.

    None below any other parametrization: that is a part of the model, and what it computes is W_0.
    """
    if not parametrize.is_parametrized(module, "weight"):
        return cast("Tensor", module.weight)
    return None if adapter_of(module) is None else pretrained_weight(module)


def magnitude_parameter(module: nn.Module) -> Tensor | None:
    """The parameter whose weight decay shrinks the magnitude: m in DoRA, else the stored weight.

    None where that is not known.
    """
    adapter = adapter_of(module)
    return adapter.magnitude if isinstance(adapter, DoRA) else stored_parameter(module)
