"""The weight a module really applies, adapters included, whatever kind of module it is."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from dora_dynamics.adapters import DoRA, LoRA, adapter_of, pretrained_weight
from dora_dynamics.effective import peft_layers
from dora_dynamics.effective.factors import built
from dora_dynamics.effective.peft_weights import tuner_weight
from dora_dynamics.effective.private_copy import private_copy, undisturbed
from dora_dynamics.effective.probe import close, probed_weight, sample_input
from dora_dynamics.effective.quantized import (
    dequantized,
    has_dequantizer,
    is_quantized,
    quantization_of,
)
from dora_dynamics.effective.registry import registered_function
from dora_dynamics.effective.weights import (
    Check,
    Dense,
    EffectiveWeight,
    LowRank,
    NoDenseWeightError,
    settled,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_KNOWN: Final = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OWN: Final = {"weight", "bias"}
_FORWARDS: Final = frozenset(known.forward for known in _KNOWN)


def effective_weight(module: nn.Module, parameter: str = "weight") -> EffectiveWeight:
    """What `module` multiplies by at this moment; nothing of the module is changed.

    In this order: what `register_effective_weight` says; LoRA and DoRA (of this package and of
    PEFT) by their factors, so that W' need not be built; any other PEFT tuner by merging a private
    copy, or by probing; a quantised layer by its decoded weight; a module that exposes `.weight`
    (a parametrization too) by that; any other affine module by probing.

    A weight of your own needs nothing if the module exposes it:

        >>> class Gain(nn.Module):  # as a parametrization: `.weight` is the effective weight
        ...     def forward(self, weight): return self.gain * weight
        >>> parametrize.register_parametrization(model.query, "weight", Gain())

    nor if the module wraps the layer it adapts as its `base_layer` and is affine:

        >>> class Rotated(nn.Module):  # y = W_0 (x + R x) + b: probed, and checked to be affine
        ...     def forward(self, x): return self.base_layer(x + x @ self.turn.T)

    An affine module that stands alone says `in_features` and `out_features`, and is made known by
    `register_linear`.

    Args:
        module: the module at a site, as `model.get_submodule` gives it.
        parameter: its name for the tensor.

    Raises:
        NoDenseWeightError: there is no dense weight to follow; the message says why.
    """
    return settled(lambda probe: read_effective(module, parameter, probe=probe))


def dense_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """The effective weight in full, read so that reading leaves no trace.

    Raises:
        NoDenseWeightError: as `effective_weight`.
    """
    found = settled(lambda probe: read_dense(module, parameter, probe=probe))
    return cast("Dense", found).weight


def read_effective(module: nn.Module, parameter: str, *, probe: bool) -> EffectiveWeight:
    """`effective_weight` with its checks not looked at yet, so that a GPU is not waited for.

    Args:
        module: as `effective_weight`.
        parameter: as `effective_weight`.
        probe: probe where a faster way was found to give another weight.

    Raises:
        NoDenseWeightError: there is no dense weight, and that is known without a check.
    """
    known = at_a_glance(module, parameter)
    if known is not None:
        return by_factors(known) if isinstance(known, LoRA) else Dense(known.detach())
    module = peft_layers.resolved(module)
    if parameter == "weight" and registered_function(module) is None:
        if peft_layers.is_tuner_layer(module):
            return tuner_weight(module, parameter, probe=probe)
        adapter = adapter_of(module)
        if adapter is not None:
            return by_factors(adapter)
    return read_dense(module, parameter, probe=probe)


def read_dense(module: nn.Module, parameter: str, *, probe: bool) -> Dense:
    """As `read_effective`, in full."""
    known = at_a_glance(module, parameter)
    if known is not None and not isinstance(known, LoRA):
        return Dense(known.detach())
    module = peft_layers.resolved(module)
    function = registered_function(module)
    if function is not None and parameter == "weight":
        return _registered(function, module)
    if peft_layers.is_tuner_layer(module):
        found = tuner_weight(module, parameter, probe=probe)
        return found if isinstance(found, Dense) else Dense(_expanded(found, module))
    if parametrize.is_parametrized(module, parameter):
        return Dense(_parametrized(module, parameter))
    if parameter == "weight" and is_quantized(module):
        return Dense(dequantized(module))
    if parameter == "weight" and not _is_plain(module):
        return _foreign(module, probe=probe)
    holder, name = peft_layers.holder_of(module, parameter)
    weight = getattr(holder, name, None)
    if not isinstance(weight, torch.Tensor):
        raise NoDenseWeightError(f"{type(module).__name__} has no tensor called {parameter!r}.")
    return Dense(weight.detach())


def stored_parameter(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """W_0 as the module holds it: its weight, or what lies below a LoRA, a DoRA or a PEFT layer.

    None where the module does not hold it: below any other parametrization (that is a part of the
    model, and what it computes is W_0), in a quantised layer, below an adapter that is merged, in
    a module of a user's own.
    """
    known = at_a_glance(module, parameter)
    if known is not None:
        return pretrained_weight(module) if isinstance(known, LoRA) else known
    base = peft_layers.original(module)
    if registered_function(base) is not None:
        return None
    inner = peft_layers.resolved(module)
    if peft_layers.is_tuner_layer(inner) and peft_layers.is_merged(inner):
        return None
    if parametrize.is_parametrized(base, parameter):
        return None if adapter_of(base) is None else pretrained_weight(base)
    if parameter == "weight" and (is_quantized(base) or not _is_plain(base)):
        return None
    holder, name = peft_layers.holder_of(base, parameter)
    stored = holder._parameters.get(name)
    return holder._buffers.get(name) if stored is None else stored


def base_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """What lies below any adapter, detached, decoded where it is quantised.

    Where the module does not tell an adapter from what it adapts (a parametrization, a module of
    a user's own) that is the effective weight.
    """
    stored = stored_parameter(module, parameter)
    if stored is not None:
        return stored.detach()
    base = peft_layers.original(module)
    return dense_weight(module if base is module else base, parameter)


def version_of(module: nn.Module, stored: Tensor) -> int:
    """Torch's count of in-place changes to a stored weight; 0 where a mere forward pass counts."""
    return 0 if peft_layers.rewrites_in_forward(module) else stored._version


def is_merged(module: nn.Module) -> bool:
    """Whether a PEFT adapter is merged into the weight below it."""
    return peft_layers.is_merged(module)


def quantization_below(module: nn.Module) -> str | None:
    """What the weight below any adapter is quantised as; None where it is not."""
    base = peft_layers.original(module)
    return quantization_of(base) if is_quantized(base) else None


def magnitude_parameter(module: nn.Module, parameter: str = "weight") -> Tensor | None:
    """The parameter whose weight decay shrinks the magnitude: m in DoRA, else the stored weight.

    None where that is not known.
    """
    known = at_a_glance(module, parameter)
    if isinstance(known, DoRA):
        return _parameter(known, "magnitude")
    if known is not None:
        return pretrained_weight(module) if isinstance(known, LoRA) else known
    module = peft_layers.resolved(module)
    is_adapted = peft_layers.is_tuner_layer(module) and parameter != "bias"
    if is_adapted and not peft_layers.adds_to_base(module):
        return peft_layers.magnitude_vector(module)
    adapter = adapter_of(module)
    if parameter == "weight" and isinstance(adapter, DoRA):
        return adapter.magnitude
    return stored_parameter(module, parameter)


def method_of(module: nn.Module) -> str | None:
    """Name of the method that trains a module's weight: "FT", "LoRA", "OFT", …; None if unknown."""
    module = peft_layers.resolved(module)
    if peft_layers.is_tuner_layer(module):
        return peft_layers.method_name(module)
    adapter = adapter_of(module)
    if adapter is not None:
        return "DoRA" if isinstance(adapter, DoRA) else "LoRA"
    if parametrize.is_parametrized(module) or not _is_plain(module):
        return None
    return "FT"


def _registered(function: Callable[[nn.Module], Tensor], module: nn.Module) -> Dense:
    """What a user's function says, where that can be the weight of the layer."""
    with torch.no_grad():
        weight: object = function(module)
    kind = type(module).__name__
    if not isinstance(weight, torch.Tensor):
        raise NoDenseWeightError(
            f"the function registered for {kind} returns a {type(weight).__name__}: it has to "
            "return the weight, as a tensor."
        )
    try:
        _, shape = _leaf_of(module)
    except NoDenseWeightError:
        return Dense(weight.detach())
    if weight.shape != shape:
        raise NoDenseWeightError(
            f"the function registered for {kind} returns a tensor of shape {tuple(weight.shape)}: "
            f"the weight of the layer has {tuple(shape)}."
        )
    return Dense(weight.detach())


def _expanded(effective: LowRank, layer: nn.Module) -> Tensor:
    """W' of a PEFT layer in full and in float64, as its base layer stores it."""
    base = peft_layers.original(layer)
    stored = dequantized(base) if is_quantized(base) else cast("Tensor", base.weight).detach()
    transposed = bool(getattr(layer, "fan_in_fan_out", False))
    return built(stored.T, effective).T if transposed else built(stored, effective)


def _parametrized(module: nn.Module, parameter: str) -> Tensor:
    """A parametrized weight, evaluated in eval mode and past `parametrize.cached`.

    `spectral_norm` would go on with its power iteration otherwise, and the cache would hand the
    detached weight to the training.
    """
    stack = cast("nn.ModuleDict", module.parametrizations)[parameter]
    modes = [(part, part.training) for part in stack.modules()]
    stack.eval()
    try:
        with torch.no_grad():
            return cast("Tensor", stack()).detach()
    finally:
        for part, mode in modes:
            part.training = mode


def at_a_glance(module: nn.Module, parameter: str) -> nn.Parameter | LoRA | None:
    """The weight of one of torch's own layers, or its adapter of this package; None of all else.

    Asked first, because it is most that is ever read: torch's very class as torch makes it, with
    its weight and bias and nothing beside them, or parametrized by a LoRA or DoRA alone; with no
    wrapper around it and no function registered for it.
    """
    kind = type(module)
    if parameter != "weight":
        return None
    if kind in _KNOWN:
        weight = module._parameters.get("weight")
        if type(weight) is not nn.Parameter or module._buffers or module._modules:
            return None
        if type(weight.data) is not torch.Tensor or weight.is_quantized:
            return None
        if not module._parameters.keys() <= _OWN or has_dequantizer(module):
            return None
        return weight if registered_function(module) is None else None
    if kind.__base__ in _KNOWN and "base_layer" not in module._modules:
        adapter = adapter_of(module)
        return adapter if adapter is None or registered_function(module) is None else None
    return None


def by_factors(adapter: LoRA) -> LowRank:
    """The weight that an adapter of this package gives, detached."""
    magnitude = _parameter(adapter, "magnitude").detach() if isinstance(adapter, DoRA) else None
    A, B = _parameter(adapter, "lora_A").detach(), _parameter(adapter, "lora_B").detach()
    return LowRank(A, B, adapter.scaling, magnitude)


def _parameter(adapter: LoRA, name: str) -> Tensor:
    """A parameter of an adapter, looked for first where modules keep theirs: that is faster."""
    found = adapter._parameters.get(name)
    return cast("Tensor", getattr(adapter, name)) if found is None else found


def _is_plain(module: nn.Module) -> bool:
    """Whether `module.weight` can be taken at its word.

    It can, but for a linear layer (or embedding, or convolution) whose class has a forward of its
    own and which holds parameters beside weight and bias, or a buffer as large as the weight:
    loralib's Linear keeps its factors so, beside the frozen weight, and a pruned layer its mask.
    Such a layer is checked.
    """
    weight = module._parameters.get("weight")
    if not isinstance(weight, torch.Tensor):
        return hasattr(module, "in_proj_weight")
    if not isinstance(module, _KNOWN) or type(module).forward in _FORWARDS:
        return True
    masks = [b for b in module._buffers.values() if b is not None and b.shape == weight.shape]
    return not module._modules and not masks and set(module._parameters) <= {"weight", "bias"}


def _foreign(module: nn.Module, *, probe: bool) -> Dense:
    """The weight of a module of a user's own: as exposed if that is what it does, else probed."""
    kind = type(module).__name__
    leaf, shape = _leaf_of(module)
    with undisturbed(module):
        copy = private_copy(module)
        exposed = getattr(copy, "weight", None)
        sample = sample_input(leaf, shape, _device(copy))
        fits = isinstance(exposed, torch.Tensor) and exposed.shape == shape
        if not probe and fits and sample is not None and type(leaf) is nn.Linear:
            weight = cast("Tensor", exposed).detach()
            holds = close(sample @ weight.T, copy(sample) - copy(torch.zeros_like(sample)))
            other = NoDenseWeightError(f"{kind} exposes another .weight than it applies.")
            return Dense(weight, (Check(holds, other, by_probing=True),))
        return probed_weight(copy, leaf, shape, kind)


def _leaf_of(module: nn.Module) -> tuple[nn.Module, torch.Size]:
    """A plain layer that says what kind of layer a module stands for, and its weight's shape."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return nn.Linear(columns, rows, bias=False, device="meta"), torch.Size((rows, columns))
    below = getattr(module, "base_layer", None)
    if isinstance(below, nn.Module):
        return _leaf_of(below)
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        return module, weight.shape
    raise NoDenseWeightError(
        f"{type(module).__name__} exposes no .weight, and has neither in_features and out_features "
        "nor a base_layer by which it could be probed: say how its weight is read with "
        "dora_dynamics.register_effective_weight."
    )


def _device(module: nn.Module) -> torch.device:
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
