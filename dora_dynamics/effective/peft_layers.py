"""The layers of PEFT: what kind they are, and the weight they apply.

LoRA and DoRA are read by their factors. Every other tuner is merged on a private copy, and the
merged weight is compared with what the layer does; where the two differ (several active OFT
adapters, say) or merging is not implemented, the weight is probed. PEFT itself is never imported:
no layer of it can be around unless someone else did.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from dora_dynamics.effective.private_copy import private_copy, undisturbed
from dora_dynamics.effective.probe import close, probed_weight, sample_input
from dora_dynamics.effective.weights import Dense, EffectiveWeight, LowRank, NoDenseWeightError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_MIXED: Final = "it mixes its matrices anew for every input, so that no one weight is applied"
REFUSED: Final[dict[str, str]] = {
    "adaption_prompt": "it adds prompts to attention and leaves every weight as it was",
    "lily": _MIXED,
    "poly": "it mixes its matrices anew for every task, so that no one weight is applied",
    "shadow": "it runs a second, smaller model beside the layers and changes no weight of theirs",
    "xlora": _MIXED,
}
"""Packages in `peft.tuners` whose layers have no dense weight, and why."""

_PROMPT_REASON: Final = "it trains prompts that stand before the input and changes no weight"
_REFUSED_VARIANTS: Final = {
    "ArrowLinearVariant": ("Arrow", _MIXED),
    "ALoraLinearVariant": ("aLoRA", "it acts on the tokens behind its invocation only, so that "
                           "two weights are applied to one input"),
}  # fmt: skip

_NAMES: Final = {
    "adalora": "AdaLoRA", "adamss": "AdaMSS", "deft": "DEFT", "delora": "DeLoRA",
    "fourierft": "FourierFT", "frod": "FRoD", "glora": "GLoRA", "gralora": "GraLoRA",
    "hira": "HiRA", "lily": "Lily", "ln_tuning": "LN tuning", "loha": "LoHa", "lokr": "LoKr",
    "lora": "LoRA", "miss": "MiSS", "peanut": "PEANuT", "poly": "Poly", "psoft": "PSOFT",
    "pvera": "PVeRA", "randlora": "RandLoRA", "road": "RoAd", "shadow": "ShadowPEFT",
    "shira": "SHiRA", "supertuning": "SuperTuning", "tinylora": "TinyLoRA",
    "trainable_tokens": "trainable tokens", "unilora": "UniLoRA", "vblora": "VB-LoRA",
    "vera": "VeRA", "waveft": "WaveFT", "xlora": "X-LoRA", "adaption_prompt": "adaption prompt",
}  # fmt: skip
_REWRITES: Final = {
    "pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA",
}  # fmt: skip
"""Values of `init_lora_weights` that change the base weight, by their beginning."""
_ATTENTION_OUTPUT: Final = "out_proj"
_FACTORED: Final = frozenset({"_ConvNd", "MultiheadAttention", "ParamWrapper", "SVDLinear"})
"""LoRA layers whose update is not `lora_B.weight @ lora_A.weight` of two linear layers."""


def resolved(module: nn.Module) -> nn.Module:
    """The module that acts now: PEFT's wrappers around trained copies and tokens looked through."""
    for _ in range(16):
        if not _is_peft(module, "utils.other"):
            return module
        if hasattr(module, "token_adapter"):
            module = cast("nn.Module", module.token_adapter)
        elif hasattr(module, "modules_to_save"):
            copies = cast("nn.ModuleDict", module.modules_to_save)
            active = [name for name in cast("list[str]", module.active_adapters) if name in copies]
            on = active and not module.disable_adapters
            module = copies[active[0]] if on else cast("nn.Module", module.original_module)
        else:
            return module
    return module


def original(module: nn.Module) -> nn.Module:
    """What the module was before it was adapted.

    That is below PEFT's copies and tokens, and below each `base_layer`, as PEFT's layers and many
    others call the layer that they adapt.
    """
    if _is_peft(module, "utils.other"):
        module = cast("nn.Module", module.original_module)
    while isinstance(below := getattr(module, "base_layer", None), nn.Module):
        module = below
    return module


def holder_of(leaf: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The plain layer that holds a tensor, and its name there; it may be one inside `leaf`."""
    *inner, name = parameter.split(".")
    for part in inner:
        leaf = original(cast("nn.Module", getattr(leaf, part)))
    return leaf, name


def acting_layer(model: nn.Module, path: str, parameter: str) -> tuple[nn.Module, str]:
    """The module to read a tensor at, and its name there.

    The module at `path` itself, but for the output projection inside a `MultiheadAttention` that
    PEFT wraps: torch's attention takes its weight and never calls it, so that the layer around the
    attention tells what is applied.

    Raises:
        NoDenseWeightError: an adapter sits on the output projection alone, where it is not called.
    """
    module, below = model, path.split(".") if path else []
    for i, part in enumerate(below):
        if isinstance(original(module), nn.MultiheadAttention):
            inside = [name for name in below[i:] if name not in ("base_layer", "original_module")]
            if inside == [_ATTENTION_OUTPUT] and original(module) is not module:
                return module, f"{_ATTENTION_OUTPUT}.{parameter}"
            if inside == [_ATTENTION_OUTPUT] and is_tuner_layer(module.get_submodule(part)):
                raise NoDenseWeightError(
                    f"the adapter on {path} has no effect: torch's attention never calls its "
                    "output projection; put the adapter on the attention module itself."
                )
        module = module.get_submodule(part)
    return module, parameter


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether the module is an adapter layer of PEFT."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def is_merged(module: nn.Module) -> bool:
    """Whether the base weight below an adapter layer holds the adapter too."""
    return any(bool(cast("Any", layer).merged_adapters) for layer in _chain(resolved(module)))


def rewrites_in_forward(module: nn.Module) -> bool:
    """Whether a layer puts its base parameter away and back in every forward pass."""
    return any(type(layer).__name__ == "ParamWrapper" for layer in _chain(resolved(module)))


def method_name(module: nn.Module) -> str:
    """Name of the method of a tuner layer: "LoRA", "DoRA", "OFT" and so on."""
    package = _package(module)
    name = _NAMES.get(package, package.upper()) or type(module).__name__
    magnitudes = getattr(module, "lora_magnitude_vector", None)
    if package == "lora" and magnitudes is not None and len(magnitudes):
        return "DoRA"
    return name


def tuner_weight(layer: nn.Module, parameter: str) -> EffectiveWeight:
    """The effective weight of a tuner layer, as its base layer stores it.

    Raises:
        NoDenseWeightError: the method has no dense weight.
    """
    refuse_layer(layer)
    factors = _factors(layer) if parameter == "weight" else None
    if factors is not None:
        return factors
    return Dense(_computed(layer, parameter)[0])


def how_read(layer: nn.Module, parameter: str = "weight") -> str:
    """Which of the ways `tuner_weight` takes: "direct", "merge on a copy" or "probed"."""
    refuse_layer(layer)
    if parameter == "weight" and _factors(layer) is not None:
        return "direct"
    return _computed(layer, parameter)[1]


def magnitude_vector(layer: nn.Module) -> Tensor | None:
    """DoRA's m, which weight decay shrinks; None where the layer has none, or several."""
    vectors = getattr(layer, "lora_magnitude_vector", {})
    held = [vectors[adapter].weight for adapter in _active(layer) if adapter in vectors]
    return cast("Tensor", held[0]) if len(held) == 1 else None


def adds_to_base(layer: nn.Module) -> bool:
    """Whether a layer is plain LoRA, whose magnitude is that of the base weight below it."""
    variants = getattr(layer, "lora_variant", {})
    return _package(layer) == "lora" and not any(a in variants for a in _active(layer))


def refuse_layer(layer: nn.Module) -> None:
    """Raise for a tuner layer whose method has no dense weight.

    Raises:
        NoDenseWeightError: with the reason.
    """
    for part in _chain(layer):
        for cls in type(part).__mro__:
            package = _package_of(cls)
            if package in REFUSED:
                _refuse(_NAMES.get(package, package), REFUSED[package])
        acts_for = getattr(part.__dict__.get("forward"), "__self__", None)
        if acts_for is not None and _package_of(type(acts_for)) == "xlora":
            _refuse("X-LoRA", REFUSED["xlora"])
        variants = getattr(part, "lora_variant", {})
        for adapter in _active(part):
            name = type(variants.get(adapter)).__name__
            if name in _REFUSED_VARIANTS:
                _refuse(*_REFUSED_VARIANTS[name])


def refuse_model(model: nn.Module) -> None:
    """Raise for a model whose PEFT method changes no weights, or has none that are dense.

    Raises:
        NoDenseWeightError: with the reason.
    """
    for adapters in configurations(model):
        for config in adapters.values():
            kind = getattr(config, "peft_type", "")
            package = str(getattr(kind, "value", kind)).lower()
            if package in REFUSED:
                _refuse(_NAMES.get(package, package), REFUSED[package])
            if getattr(config, "is_prompt_learning", False):
                _refuse(package.replace("_", " "), _PROMPT_REASON)


def rewriting_method(model: nn.Module, module: nn.Module) -> str | None:
    """The method on `module` that changed the base weight when it started; None if none did.

    Told by the PEFT configuration that the model carries; KaSA also by the layer.
    """
    for layer in _chain(resolved(module)):
        held = set(cast("Any", layer)._get_available_adapters())
        variants = getattr(layer, "lora_variant", {})
        if any(type(variant).__name__ == "KasaLinearVariant" for variant in variants.values()):
            return "KaSA"
        for adapters in configurations(model):
            for adapter, config in adapters.items():
                start = getattr(config, "init_lora_weights", None)
                if adapter in held and isinstance(start, str):
                    for prefix, name in _REWRITES.items():
                        if start.startswith(prefix):
                            return name
    return None


def configurations(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The PEFT configurations that a model or the models inside it carry."""
    for module in model.modules():
        adapters = module.__dict__.get("peft_config") or module.__dict__.get("_peft_config")
        if isinstance(adapters, dict):
            yield adapters


def _computed(layer: nn.Module, parameter: str) -> tuple[Tensor, str]:
    """The effective weight of any tuner layer and the way it was found."""
    with undisturbed(layer), warnings.catch_warnings():
        # What PEFT says about a merge concerns the copy, which nobody else sees.
        warnings.filterwarnings("ignore", module=r"peft\.")
        copy = private_copy(layer)
        leaf = original(copy)
        holder, name = holder_of(leaf, parameter)
        stored = cast("Tensor", getattr(holder, name))
        shape = stored.shape
        sample = sample_input(leaf, shape, stored.device)
        expected = None if sample is None else _answer(copy, sample)
        merged = _merged(copy, parameter)
        if merged is not None and (expected is None or _agrees(merged[1], sample, expected)):
            return merged[0], "merge on a copy"
        if parameter != "weight":
            raise NoDenseWeightError(
                f"{method_name(layer)} cannot be merged into {parameter}, and what it does to it "
                "cannot be probed."
            )
        return probed_weight(private_copy(layer), leaf, shape, method_name(layer)), "probed"


def _answer(copy: nn.Module, sample: Tensor) -> Tensor | None:
    try:
        return cast("Tensor", copy(sample))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None


def _agrees(leaf: nn.Module, sample: Tensor | None, expected: Tensor) -> bool:
    answer = None if sample is None else _answer(leaf, sample)
    return answer is not None and close(answer, expected)


def _merged(copy: nn.Module, parameter: str) -> tuple[Tensor, nn.Module] | None:
    """The weight after merging the copy, and the plain layer that holds it."""
    try:
        for layer in reversed(list(_chain(copy))):
            part = cast("Any", layer)
            if part.merged_adapters:
                continue
            if not part.disable_adapters:
                part.merge()
    except (NotImplementedError, ValueError, RuntimeError, TypeError, AttributeError, KeyError):
        return None
    leaf = original(copy)
    holder, name = holder_of(leaf, parameter)
    weight = getattr(holder, name, None)
    return (weight.detach(), leaf) if isinstance(weight, torch.Tensor) else None


def _factors(layer: nn.Module) -> EffectiveWeight | None:
    """LoRA and DoRA by their factors; None for what they do not describe."""
    if _package(layer) != "lora" or any(cls.__name__ in _FACTORED for cls in type(layer).__mro__):
        return None
    base = cast("Any", layer).base_layer
    if is_tuner_layer(base) or nn.utils.parametrize.is_parametrized(base, "weight"):
        return None
    if is_merged(layer) or cast("Any", layer).disable_adapters:
        return None
    adapters = _active(layer)
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


def _active(layer: nn.Module) -> list[str]:
    """The active adapters that this layer really has."""
    part = cast("Any", layer)
    held = set(part._get_available_adapters())
    return [adapter for adapter in part.active_adapters if adapter in held]


def _chain(layer: nn.Module) -> Iterator[nn.Module]:
    """The tuner layers around one plain layer, from the outside in."""
    while is_tuner_layer(layer):
        yield layer
        layer = cast("nn.Module", layer.base_layer)


def _package(module: nn.Module) -> str:
    return next((p for cls in type(module).__mro__ if (p := _package_of(cls))), "")


def _package_of(cls: type) -> str:
    parts = cls.__module__.split(".")
    return parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 3 else ""


def _is_peft(module: nn.Module, where: str) -> bool:
    return any(cls.__module__ == f"peft.{where}" for cls in type(module).__mro__)


def _refuse(method: str, reason: str) -> None:
    raise NoDenseWeightError(f"{method} has no effective weight to follow: {reason}.")
