"""Adapters away from their start, ours and PEFT's with the same numbers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.adapters import DoRA, LoRA, adapter_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


APPLY = {"LoRA": dd.apply_lora, "DoRA": dd.apply_dora}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def grad(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def adapters(model: nn.Module) -> dict[str, LoRA]:
    found = {name: adapter_of(module) for name, module in model.named_modules()}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def disturb(model: nn.Module, seed: int = 5) -> None:
    """Moves A, B and m away from where they start, some m below zero."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                parameter.add_(noise.to(parameter), alpha=0.3)
            if isinstance(adapter, DoRA):
                adapter.magnitude[1] *= -1


def peft_of(model: nn.Module, dora: bool, targets: list[str], **options: Any) -> Any:
    """PEFT's model with the same adapters as `model` will carry: rank 3, alpha 7."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.0, target_modules=targets, use_dora=dora, **options
    )
    return peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)


def peft_parameters(theirs: Any, name: str) -> dict[str, nn.Parameter]:
    layer = theirs.base_model.model.get_submodule(name)
    parameters = {
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
    }
    if len(layer.lora_magnitude_vector):
        parameters["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return parameters


def copy_to_peft(ours: nn.Module, theirs: Any) -> None:
    with torch.no_grad():
        for name, adapter in adapters(ours).items():
            for key, parameter in peft_parameters(theirs, name).items():
                parameter.copy_(getattr(adapter, key).view_as(parameter))
