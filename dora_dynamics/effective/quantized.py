"""Quantised layers: the weight they stand for, and how to add a kind that is not known here.

A quantised layer multiplies by codes and scales; the weight it stands for is what they decode to.
The functions below decode the layers of torchao, HQQ and GPTQ through what those layers themselves
offer, and those of bitsandbytes and AWQ through their packages' functions; `register_dequantizer`
adds one more.
"""

from __future__ import annotations

import copy
import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from dora_dynamics.effective.registry import NO_MATRIX
from dora_dynamics.effective.weights import NoDenseWeightError
from dora_dynamics.sites import CODES, register_linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_dequantizers: dict[type[nn.Module], Callable[[nn.Module], Tensor]] = {}
_BITSANDBYTES: Final = frozenset({"Params4bit", "Int8Params"})
_DECODERS: Final = {"dequantize": False, "dequantize_weight": True}
"""Methods that decode a layer, and whether to (in, out): GPTQ's do, HQQ's not."""
_AWQ: Final = frozenset({
    "AwqGEMMLinear", "AwqGEMMTritonLinear", "AwqTorchLinear", "WQLinear_GEMM",
})  # fmt: skip
"""The layers of GPTQModel and AutoAWQ that are packed for a plain matrix product."""
_AWQ_UNPACKING: Final = (
    "gptqmodel.quantization.awq.utils.packing_utils",
    "awq.utils.packing_utils",
)


def register_dequantizer(
    module_type: type[nn.Module], function: Callable[[nn.Module], Tensor]
) -> None:
    """Say how the weight of a quantised layer is decoded.

    Modules of the class are followed as linear layers from now on (as `register_linear` makes them
    be), by their `in_features` and `out_features`.

    Args:
        module_type: class of the layer, subclasses included.
        function: given a layer, its weight as a floating-point tensor (out, in).

    Example:
        >>> dd.register_dequantizer(Int8Linear, lambda layer: layer.codes * layer.scale[:, None])
    """
    _dequantizers[module_type] = function
    if not issubclass(module_type, NO_MATRIX):
        register_linear(module_type)


def is_quantized(module: nn.Module) -> bool:
    """Whether the layer itself (nothing inside it) holds its weight as codes."""
    if _registered(module) is not None:
        return True
    if not (CODES.isdisjoint(module._parameters) and CODES.isdisjoint(module._buffers)):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and (
        type(weight).__name__ in _BITSANDBYTES or _decodes_itself(weight)
    )


def quantization_of(module: nn.Module) -> str:
    """What a quantised layer is quantised as, in a few words for `run.json`."""
    weight = module._parameters.get("weight")
    if weight is None:
        return type(module).__name__
    kind = type(weight) if type(weight.data) is torch.Tensor else type(weight.data)
    return f"{type(module).__name__} of {kind.__name__}"


def dequantized(module: nn.Module) -> Tensor:
    """The weight (out, in) that a quantised layer stands for, detached.

    Raises:
        NoDenseWeightError: nothing here knows how to decode this layer.
    """
    with torch.no_grad():
        function = _registered(module)
        if function is not None:
            return function(module).detach()
        weight = module._parameters.get("weight")
        if weight is not None and _decodes_itself(weight):
            return weight.detach().dequantize()
        for name, is_in_out in _DECODERS.items():
            method = getattr(module, name, None)
            if callable(method):
                return _as_out_in(module, method(), is_in_out=is_in_out)
        if any(cls.__name__ in _AWQ for cls in type(module).__mro__):
            return _from_awq(module)
        if type(weight).__name__ in _BITSANDBYTES and "bitsandbytes" in sys.modules:
            return _from_bitsandbytes(module, weight)
    raise NoDenseWeightError(
        f"{type(module).__name__} keeps its weight quantised in a way that is not known here: say "
        "how it is decoded with dora_dynamics.register_dequantizer."
    )


def dequantized_module(module: nn.Module) -> nn.Linear:
    """A plain linear layer with the weight and bias of a quantised one."""
    weight = dequantized(module)
    bias = getattr(module, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def has_dequantizer(module: nn.Module) -> bool:
    """Whether a dequantizer is registered for the class of the module or one of its bases."""
    return _registered(module) is not None


def _registered(module: nn.Module) -> Callable[[nn.Module], Tensor] | None:
    if not _dequantizers:
        return None
    return next((_dequantizers[cls] for cls in type(module).__mro__ if cls in _dequantizers), None)


def _decodes_itself(weight: Tensor) -> bool:
    """A tensor subclass that says how it is decoded, as torchao's and torch's own do."""
    if weight.is_quantized:
        return True
    inner = weight.data
    return (
        type(inner) not in (torch.Tensor, nn.Parameter)
        and callable(getattr(type(inner), "dequantize", None))
        and type(inner).dequantize is not torch.Tensor.dequantize
    )


def _from_bitsandbytes(module: nn.Module, weight: Any) -> Tensor:
    """Decode a layer of bitsandbytes and leave it as it is.

    In eval mode on a CPU its 4-bit layers repack their codes, which its own decoding then misreads:
    they are brought back on a copy first. Its 8-bit layers keep their scales in the weight until
    the first forward pass, and in the layer's state from then on.
    """
    functional = sys.modules["bitsandbytes"].functional
    if type(weight).__name__ == "Params4bit":
        codes, coding = weight.data, weight.quant_state
        if getattr(coding, "packing_format_for_cpu", False):
            unpack = functional._convert_weight_packed_for_cpu_inverse
            codes, coding = unpack(codes, copy.copy(coding))
        decoded: Tensor = functional.dequantize_4bit(codes, coding)
        return decoded
    state = getattr(module, "state", None)
    scales = getattr(weight, "SCB", None)
    scales = getattr(state, "SCB", None) if scales is None else scales
    kept: Tensor | None = getattr(state, "CB", None)
    codes = weight.data if kept is None else kept
    if scales is None or codes.dtype != torch.int8:
        raise NoDenseWeightError(
            f"{type(module).__name__} has not quantised its weight yet: move the model to the "
            "device it trains on first."
        )
    rows: Tensor = scales.to(codes.device).unsqueeze(1) / 127
    return codes * rows


def _from_awq(module: Any) -> Tensor:
    """Unpack an AWQ layer by the function of the package that it comes from."""
    package = type(module).__module__.partition(".")[0]
    name = next(name for name in _AWQ_UNPACKING if name.partition(".")[0] == package)
    bits = module.bits if hasattr(module, "bits") else module.w_bit
    unpack = importlib.import_module(name).dequantize_gemm
    weight: Tensor = unpack(module.qweight, module.qzeros, module.scales, bits, module.group_size)
    return weight.detach().T


def _as_out_in(module: nn.Module, weight: Tensor, *, is_in_out: bool) -> Tensor:
    """What a layer decodes to as (out, in); on a weight that is not square its own sizes tell."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if rows != columns and tuple(weight.shape) in ((rows, columns), (columns, rows)):
        is_in_out = tuple(weight.shape) == (columns, rows)
    return weight.detach().T if is_in_out else weight.detach()
