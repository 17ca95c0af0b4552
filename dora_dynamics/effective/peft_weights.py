"""The weight that a layer of PEFT applies, and the way it is found.

LoRA and DoRA are read by their factors. Every other tuner is merged on a private copy, and the
merged weight is compared with what the layer does; where the two differ (several active OFT
adapters, say) or merging is not implemented, the weight is probed.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from dora_dynamics.effective.peft_layers import (
    active_adapters,
    chain,
    holder_of,
    is_merged,
    is_tuner_layer,
    method_name,
    original,
    package_of,
    refuse_layer,
)
from dora_dynamics.effective.private_copy import private_copy, undisturbed
from dora_dynamics.effective.probe import close, probed_weight, sample_input
from dora_dynamics.effective.weights import (
    Check,
    Dense,
    EffectiveWeight,
    LowRank,
    NoDenseWeightError,
    failed,
)
from dora_dynamics.effective.without_waiting import WithoutWaiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_FACTORED: Final = frozenset({"_ConvNd", "MultiheadAttention", "ParamWrapper", "SVDLinear"})
"""LoRA layers whose update is not `lora_B.weight @ lora_A.weight` of two linear layers."""
_KEPT_ON_CPU: Final = "_base_weight_before_merge"
"""Where some tuners put a copy of the base weight in host memory before they merge."""


def tuner_weight(layer: nn.Module, parameter: str, *, probe: bool = False) -> EffectiveWeight:
    """The effective weight of a tuner layer, as its base layer stores it.

    Its checks are not looked at yet, and a GPU is not waited for.

    Args:
        layer: the tuner layer.
        parameter: its base layer's name for the tensor.
        probe: probe where merging a copy would do, because that was found to be wrong.

    Raises:
        NoDenseWeightError: the method has no dense weight.
    """
    refuse_layer(layer)
    factors = _factors(layer) if parameter == "weight" else None
    if factors is not None:
        return factors
    merged = None if probe else _by_merging(layer, parameter)
    return _by_probing(layer, parameter) if merged is None else merged


def how_read(layer: nn.Module, parameter: str = "weight") -> str:
    """Which way leads to the weight: "direct", "merge on a copy" or "probed"."""
    refuse_layer(layer)
    if parameter == "weight" and _factors(layer) is not None:
        return "direct"
    merged = _by_merging(layer, parameter)
    if merged is not None and not failed(merged.checks):
        return "merge on a copy"
    for check in failed(_by_probing(layer, parameter).checks):
        raise check.otherwise
    return "probed"


def _by_merging(layer: nn.Module, parameter: str) -> Dense | None:
    """What a private copy of a layer holds once it is merged; None where it cannot be merged."""
    with undisturbed(layer), warnings.catch_warnings(), WithoutWaiting() as taken:
        # What PEFT, or torch when PEFT calls it, says concerns the copy, which nobody else sees.
        warnings.filterwarnings("ignore", module=rf"peft\.|{re.escape(WithoutWaiting.__module__)}")
        copy = private_copy(layer)
        leaf = original(copy)
        stored = _stored(leaf, parameter)
        sample = sample_input(leaf, stored.shape, stored.device)
        expected = None if sample is None else _answer(copy, sample)
        if not _merge(copy):
            return None
        leaf = original(copy)
        holder, name = holder_of(leaf, parameter)
        weight = getattr(holder, name, None)
        if not isinstance(weight, torch.Tensor):
            return None
        right = list(taken.right)
        if sample is not None and expected is not None:
            answer = _answer(leaf, sample)
            if answer is None:
                return None
            right.append(close(answer, expected))
        differs = NoDenseWeightError(
            f"{method_name(layer)} merges into another weight than the one that it applies."
        )
        checks = tuple(Check(holds, differs, by_probing=True) for holds in right)
        return Dense(weight.detach(), checks)


def _by_probing(layer: nn.Module, parameter: str) -> Dense:
    """The weight read off what a private copy of the layer does."""
    if parameter != "weight":
        raise NoDenseWeightError(
            f"{method_name(layer)} cannot be merged into {parameter}, and what it does to it "
            "cannot be probed."
        )
    with undisturbed(layer), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")
        copy = private_copy(layer)
        leaf = original(copy)
        return probed_weight(copy, leaf, _stored(leaf, parameter).shape, method_name(layer))


def _stored(leaf: nn.Module, parameter: str) -> Tensor:
    holder, name = holder_of(leaf, parameter)
    return cast("Tensor", getattr(holder, name))


def _answer(copy: nn.Module, sample: Tensor) -> Tensor | None:
    try:
        return cast("Tensor", copy(sample))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None


def _merge(copy: nn.Module) -> bool:
    """Merge a private copy from the inside out; False where that is not implemented."""
    try:
        for layer in reversed(list(chain(copy))):
            part = cast("Any", layer)
            if part.merged_adapters or part.disable_adapters:
                continue
            if getattr(part, _KEPT_ON_CPU, "") is None:
                setattr(part, _KEPT_ON_CPU, part.get_base_layer().weight.detach().clone())
            part.merge()
    except (NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError, KeyError):
        return False
    return True


def _factors(layer: nn.Module) -> EffectiveWeight | None:
    """LoRA and DoRA by their factors; None for what they do not describe."""
    if package_of(layer) != "lora" or any(cls.__name__ in _FACTORED for cls in type(layer).__mro__):
        return None
    base = cast("Any", layer).base_layer
    if is_tuner_layer(base) or nn.utils.parametrize.is_parametrized(base, "weight"):
        return None
    if is_merged(layer) or cast("Any", layer).disable_adapters:
        return None
    adapters = active_adapters(layer)
    variants = cast("Any", layer).lora_variant
    kinds = [type(variants.get(adapter)).__name__ for adapter in adapters]
    if not adapters:
        return None
    if isinstance(base, nn.Embedding):
        read: Callable[[Any, str], tuple[Tensor, Tensor] | None] = _embedding_factors
        allowed = {"NoneType"}
    else:
        read, allowed = _linear_factors, {"NoneType", "DoraLinearVariant"}
    if not set(kinds) <= allowed or (len(kinds) > 1 and "DoraLinearVariant" in kinds):
        return None
    pairs = [read(layer, adapter) for adapter in adapters]
    scalings = [float(cast("Any", layer).scaling[adapter]) for adapter in adapters]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        return None
    if len(found) == 1:
        magnitude = None
        if kinds[0] == "DoraLinearVariant":
            vector = cast("Any", layer).lora_magnitude_vector[adapters[0]]
            magnitude = vector.weight.detach().flatten()
        return LowRank(*found[0], scalings[0], magnitude)
    wide = [
        (A.to(torch.float64), s * B.to(torch.float64))
        for (A, B), s in zip(found, scalings, strict=True)
    ]
    return LowRank(torch.cat([A for A, _ in wide]), torch.cat([B for _, B in wide], dim=1), 1.0)


def _linear_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    if not (_is_linear(A) and _is_linear(B)):
        return None
    return A.weight.detach(), B.weight.detach()


def _is_linear(module: nn.Module) -> bool:
    """Whether it is `nn.Linear` itself, or what `fully_shard` makes of it: its forward is that."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _embedding_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """Of the table itself, tokens by dimensions: what PEFT calls B Aᵀ, the other way around."""
    if adapter not in layer.lora_embedding_A:
        return None
    return layer.lora_embedding_B[adapter].detach().T, layer.lora_embedding_A[adapter].detach().T
