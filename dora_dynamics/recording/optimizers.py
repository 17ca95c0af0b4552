"""What a recorder reads off an optimizer: its settings, its steps, its weight decay."""

from __future__ import annotations

import math
import operator
import sys
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.optim import Optimizer

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from types import FrameType

    from torch import Tensor, nn

REQUIRES_GRAD: Final = operator.attrgetter("requires_grad")
GRADIENT: Final = operator.attrgetter("grad")
_DECOUPLED: Final = frozenset({"AdamW"})


def decays(optimizer: Optimizer) -> bool:
    """Whether a step of the optimizer decays any parameter."""
    return any(_decays(group) and group["params"] for group in optimizer.param_groups)


def share_of(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """What the step that an optimizer has just made takes off a group of its parameters.

    That is lr · weight_decay, of each that has a gradient and relative to it. NaN where decay is
    not decoupled from the gradient.
    """
    if not _decays(group):
        return 0.0
    is_decoupled = type(optimizer).__name__ in _DECOUPLED
    known = is_decoupled or group.get("decoupled_weight_decay", False)
    return float(group["lr"]) * float(group["weight_decay"]) if known else math.nan


def _decays(group: Mapping[str, Any]) -> bool:
    return bool(group.get("weight_decay", 0.0) != 0)


def are_frozen(parameters: Collection[Tensor]) -> bool:
    """Whether no optimizer will change any: they step over parameters without a gradient.

    Loops that run in C: this is asked at every step of the training.
    """
    return not any(map(REQUIRES_GRAD, parameters)) and has_no_gradient(parameters)


def is_frozen(parameter: Tensor) -> bool:
    """The same of one."""
    return are_frozen((parameter,))


def has_no_gradient(parameters: Collection[Tensor]) -> bool:
    """Whether an optimizer's step passes over all of these."""
    return not any(map(operator.is_not, map(GRADIENT, parameters), repeat(None)))


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
    """Whether one of the optimizers trains a parameter of one of the modules.

    A frozen one does not count where others train: an optimizer that was made before the adapter
    still holds the layer below it. Where all are frozen, they may be unfrozen later.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    own = [parameter for module in modules for parameter in module.parameters()]
    trainable = list(filter(REQUIRES_GRAD, own))
    return any(id(parameter) in held for parameter in trainable or own)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps, below the wrappers of Accelerate and Lightning.

    Raises:
        InputError: it is none.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return unwrapped(inner)
    if not hasattr(optimizer, "param_groups"):
        raise InputError(
            "the recorder is attached to the optimizer that trains, such as torch.optim.AdamW: "
            f"{type(optimizer).__name__} is none."
        )
    return optimizer


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was called by a GradScaler that found Inf, and so did nothing."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def classes_with_steps(optimizer: Optimizer) -> list[type[Optimizer]]:
    """The classes above an optimizer's own that have a step, which its own may call."""
    above = type(optimizer).__mro__[1:]
    return [
        c for c in above if issubclass(c, Optimizer) and c is not Optimizer and "step" in vars(c)
    ]


def is_inner_step(optimizer: Optimizer, above: Sequence[type[Optimizer]]) -> bool:
    """Whether the step that calls a hook was itself called by a step of the same optimizer.

    A subclass's step may call `super().step()`, and torch calls the hooks of both, once it has seen
    an optimizer of the class above.

    Args:
        optimizer: whose step calls the hook.
        above: `classes_with_steps` of it.
    """
    if not any(getattr(one.step, "hooked", False) for one in above):
        return False
    code = getattr(type(optimizer).step, "__code__", None)  # torch's, around every class's step
    frame: FrameType | None = sys._getframe(1)
    found = 0
    while frame is not None and found < 2:
        found += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found > 1


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
