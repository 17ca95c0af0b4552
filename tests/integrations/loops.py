"""Steps of a plain PyTorch loop, with the data that the number of the step gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(step)
    return (
        torch.randint(11, (8, 7), generator=source),
        torch.randint(4, (8,), generator=source),
    )


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    tokens, labels = batch(step)
    return nn.functional.cross_entropy(model(tokens), labels)


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, **{"lr": 1e-2, "weight_decay": 0.1} | settings)


def step_with(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss_of(model, step))
    optimizer.step()


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())
