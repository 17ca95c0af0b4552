"""The layers of PEFT: what kind they are, what lies below them, and which have no weight.

PEFT itself is never imported: no layer of it can be around unless someone else did.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

from torch import nn

from dora_dynamics.effective.weights import NoDenseWeightError

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def resolved(module: nn.Module) -> nn.Module:
    """The module that acts now: PEFT's wrappers around trained copies and tokens looked through."""
    for _ in range(16):
        if not _is_wrapper(module):
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
    if _is_wrapper(module):
        module = cast("nn.Module", module.original_module)
    while isinstance(below := _layer_below(module), nn.Module):
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
    kind: Any = type(module)
    return "peft.tuners.tuners_utils" in sys.modules and _is_tuner_class(kind)


def is_merged(module: nn.Module) -> bool:
    """Whether the base weight below an adapter layer holds the adapter too."""
    return any(bool(cast("Any", layer).merged_adapters) for layer in chain(resolved(module)))


def rewrites_in_forward(module: nn.Module) -> bool:
    """Whether a layer puts its base parameter away and back in every forward pass."""
    return any(type(layer).__name__ == "ParamWrapper" for layer in chain(resolved(module)))


def method_name(module: nn.Module) -> str:
    """Name of the method of a tuner layer: "LoRA", "DoRA", "OFT" and so on."""
    package = package_of(module)
    name = _NAMES.get(package, package.upper()) or type(module).__name__
    magnitudes = getattr(module, "lora_magnitude_vector", None)
    if package == "lora" and magnitudes is not None and len(magnitudes):
        return "DoRA"
    return name


def magnitude_vector(layer: nn.Module) -> Tensor | None:
    """DoRA's m, which weight decay shrinks; None where the layer has none, or several."""
    vectors = getattr(layer, "lora_magnitude_vector", {}) if package_of(layer) else {}
    held = [vectors[adapter].weight for adapter in active_adapters(layer) if adapter in vectors]
    return cast("Tensor", held[0]) if len(held) == 1 else None


def adds_to_base(layer: nn.Module) -> bool:
    """Whether a layer is plain LoRA, whose magnitude is that of the base weight below it."""
    variants = getattr(layer, "lora_variant", {})
    varied = bool(variants) and any(a in variants for a in active_adapters(layer))
    return package_of(layer) == "lora" and not varied


def refuse_layer(layer: nn.Module) -> None:
    """Raise for a tuner layer whose method has no dense weight.

    Raises:
        NoDenseWeightError: with the reason.
    """
    for part in chain(layer):
        for cls in type(part).__mro__:
            package = _package_of_class(cls)
            if package in REFUSED:
                _refuse(_NAMES.get(package, package), REFUSED[package])
        acts_for = getattr(part.__dict__.get("forward"), "__self__", None)
        if acts_for is not None and package_of(acts_for) == "xlora":
            _refuse("X-LoRA", REFUSED["xlora"])
        variants = getattr(part, "lora_variant", {})
        for adapter in active_adapters(part) if variants else ():
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
    for layer in chain(resolved(module)):
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


def active_adapters(layer: nn.Module) -> list[str]:
    """The active adapters that this layer really has."""
    part = cast("Any", layer)
    held = set(part._get_available_adapters())
    return [adapter for adapter in part.active_adapters if adapter in held]


def chain(layer: nn.Module) -> Iterator[nn.Module]:
    """The tuner layers around one plain layer, from the outside in."""
    while is_tuner_layer(layer):
        yield layer
        layer = cast("nn.Module", _layer_below(layer))


def _layer_below(module: nn.Module) -> object:
    """`module.base_layer`, None where there is none.

    Looked for where modules keep theirs: to find that an attribute is none takes torch far longer.
    """
    found = module._modules.get("base_layer")
    if found is None and (
        type(module).__getattr__ is not nn.Module.__getattr__
        or "base_layer" in module.__dict__
        or hasattr(type(module), "base_layer")
    ):
        return getattr(module, "base_layer", None)
    return found


def package_of(module: nn.Module) -> str:
    """The package in `peft.tuners` that the layer comes from, empty where it is none of those.

    Empty also for a subclass with a forward of its own, as PEFT's custom modules have: it may do
    anything with the matrices that it inherits.
    """
    kind: Any = type(module)
    if _brings_its_forward(kind):
        return ""
    return next((p for cls in kind.__mro__ if (p := _package_of_class(cls))), "")


@lru_cache(maxsize=1024)
def _brings_its_forward(kind: Any) -> bool:
    """Whether the forward of a class is not one of PEFT's."""
    origin = next((cls.__module__ for cls in kind.__mro__ if "forward" in vars(cls)), "")
    return origin.partition(".")[0] != "peft"


@lru_cache(maxsize=1024)
def _package_of_class(cls: Any) -> str:
    parts = cls.__module__.split(".")
    return parts[2] if parts[:2] == ["peft", "tuners"] and len(parts) > 3 else ""


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it is one of PEFT's wrappers around trained copies and tokens."""
    kind: Any = type(module)
    return "peft" in sys.modules and _is_wrapper_class(kind)


@lru_cache(maxsize=1024)
def _is_tuner_class(kind: Any) -> bool:
    return issubclass(kind, sys.modules["peft.tuners.tuners_utils"].BaseTunerLayer)


@lru_cache(maxsize=1024)
def _is_wrapper_class(kind: Any) -> bool:
    return any(cls.__module__ == "peft.utils.other" for cls in kind.__mro__)


def _refuse(method: str, reason: str) -> None:
    raise NoDenseWeightError(f"{method} has no effective weight to follow: {reason}.")
