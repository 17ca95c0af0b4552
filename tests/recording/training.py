"""What the tests of a recorder train, by three methods with AdamW, and how they look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import dora_dynamics as dd

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


TARGETS = ["query", "value"]
METHODS = ["FT", "LoRA", "DoRA"]


def adapt(model: nn.Module, method: str) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    if method == "LoRA":
        dd.apply_lora(model, TARGETS, rank=2, generator=generator)
    elif method == "DoRA":
        dd.apply_dora(model, TARGETS, rank=2, generator=generator)
    return model


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, **{"lr": 1e-2, "weight_decay": 0.1} | options)


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


def tensors_held(thing: object, seen: set[int] | None = None) -> list[torch.Tensor]:
    """The tensors that an object holds by itself, the model's modules left out."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (nn.Module, torch.optim.Optimizer)):
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    return [tensor for part in parts for tensor in tensors_held(part, seen)]


def recorded_steps(recorder: dd.Recorder) -> list[int]:
    return sorted(recorder.trajectory["step"].unique())


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, err_msg=path)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert one == other, path
