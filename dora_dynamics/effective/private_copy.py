"""A private copy of one layer, to be merged or probed while the layer itself goes on training.

Merging in place would leave its mark: one merge and unmerge in fp32 changes about a fifth of a
base weight's entries. A copy with its own float64 tensors can be merged exactly and thrown away.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from dora_dynamics._arrays import is_sharded
from dora_dynamics._precision import full_precision
from dora_dynamics.effective.quantized import dequantized_module, is_quantized
from dora_dynamics.effective.weights import NoDenseWeightError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_HOOKS: Final = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
_ACCELERATE: Final = ("_hf_hook",)
"""Where accelerate keeps what may hold the weights of a whole model."""
_OPAQUE: Final = (
    str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, MethodType,
    BuiltinFunctionType, torch.dtype, torch.device, torch.Generator,
)  # fmt: skip


def private_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` in float64 and eval mode that shares nothing with it.

    Hooks are left out, quantised linear layers become plain ones that hold the dequantised weight.
    Tensors that the module shares with others (VeRA's projections, VB-LoRA's vector bank) are
    copied like its own.

    Raises:
        NoDenseWeightError: a tensor of the module is sharded.
    """
    memo: dict[int, Any] = {}
    kept: list[Any] = []  # ids in the memo stay valid as long as what they name is alive
    with torch.no_grad():
        for found in _reachable(module):
            kept.append(found)
            if isinstance(found, nn.Module):
                if is_quantized(found):
                    memo[id(found)] = _in_float64(dequantized_module(found))
                    continue
                for name in _HOOKS:
                    hooks = found.__dict__.get(name)
                    if hooks is not None:
                        memo[id(hooks)] = OrderedDict()
                for name in _ACCELERATE:
                    if name in found.__dict__:
                        memo[id(found.__dict__[name])] = None
            elif isinstance(found, torch.Generator):
                memo[id(found)] = found.clone_state()
            else:
                memo[id(found)] = _tensor_copy(found)
        copied = copy.deepcopy(module, memo)
    copied.eval()
    for part in copied.modules():
        _unhook(part)
    return copied


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """No gradients, full precision, and random state put back on the CPU and the module's GPUs."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    gpus = [device for device in devices if device.type == "cuda"]
    with (
        torch.no_grad(),
        full_precision(device.type for device in devices),
        torch.random.fork_rng(devices=gpus),
    ):
        yield


def _unhook(part: nn.Module) -> None:
    """Undo what accelerate did to a module's `forward`, and widen dtypes that it goes by."""
    part.__dict__.pop("_hf_hook", None)
    if part.__dict__.pop("_old_forward", None) is not None:
        part.__dict__.pop("forward", None)
    for name, value in part.__dict__.items():
        if isinstance(value, torch.dtype) and value.is_floating_point:
            part.__dict__[name] = torch.float64


def _reachable(root: object) -> Iterator[Any]:
    """Every module, tensor and generator that a deep copy of `root` would copy."""
    seen: set[int] = set()
    stack = [root]
    alive = []
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        alive.append(item)
        if isinstance(item, (torch.Tensor, torch.Generator)):
            yield item
        elif isinstance(item, nn.Module):
            yield item
            if not is_quantized(item):
                skipped = (*_HOOKS, *_ACCELERATE)
                stack.extend(v for name, v in item.__dict__.items() if name not in skipped)
        elif isinstance(item, _OPAQUE):
            continue
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        elif hasattr(item, "__dict__"):
            stack.extend(vars(item).values())


def _tensor_copy(tensor: Tensor) -> Tensor:
    if is_sharded(tensor):
        raise NoDenseWeightError(
            "its weight is sharded, and reading this kind of adapter would gather it: record it "
            "unsharded, or compare its checkpoints (dora-dynamics compare)"
        )
    own = _widened(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(own, requires_grad=False)
    return own


def _widened(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128, copy=True)
    if tensor.is_floating_point():
        return tensor.to(wide_dtype(tensor.device), copy=True)
    return tensor.clone()


def wide_dtype(device: torch.device) -> torch.dtype:
    """Float64, and float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _in_float64(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = _widened(tensor.data)
    return module.requires_grad_(False)
