"""What a recorder reads off an optimizer: its settings, its steps, its weight decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

_DECOUPLED: Final = frozenset({"AdamW"})


class StepDecay:
    """lr · weight_decay of the step that an optimizer has just made, for each parameter."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Read the optimizer's parameter groups as they are now."""
        is_decoupled = type(optimizer).__name__ in _DECOUPLED
        self._share_of: dict[int, float] = {}
        for group in optimizer.param_groups:
            if group.get("weight_decay", 0.0) != 0:
                known = is_decoupled or group.get("decoupled_weight_decay", False)
                share = float(group["lr"]) * float(group["weight_decay"]) if known else math.nan
                self._share_of.update((id(parameter), share) for parameter in group["params"])

    def of(self, parameter: Tensor | None) -> float:
        """What the step takes off this parameter, relative to it.

        Zero where nothing decays it. NaN where decay is not decoupled from the gradient, or where
        the parameter is not known (None) and the optimizer decays anything.
        """
        if parameter is None:
            return math.nan if self._share_of else 0.0
        share = self._share_of.get(id(parameter))
        return 0.0 if share is None or parameter.grad is None else share


def settings(optimizers: Sequence[Optimizer]) -> dict[str, object]:
    """Class and settings of the optimizers that train, as JSON values."""
    found = [
        {
            "optimizer": type(optimizer).__name__,
            "parameter_groups": [
                {key: _as_plain(value) for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
            ],
        }
        for optimizer in optimizers
    ]
    return dict(found[0]) if len(found) == 1 else {"optimizers": found}


def trains_any(optimizers: Sequence[Optimizer], modules: Iterable[nn.Module]) -> bool:
    """Whether one of the optimizers trains a parameter of one of the modules."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    return any(id(parameter) in trained for module in modules for parameter in module.parameters())


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps, below the wrappers of Accelerate and Lightning."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was called by a GradScaler that found Inf, and so did nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _as_plain(value: object) -> object:
    """An optimizer's setting as a JSON value, in words where it is none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [_as_plain(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
