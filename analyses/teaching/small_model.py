"""Twelve small weights trained on regression: seconds of real training behind the figures.

Each layer is one `query` projection of its own size of weights, and learns a low-rank change of
its pre-trained weight from random inputs. The layers do not touch each other, so that they are
twelve independent examples of one kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import torch
from torch import nn

import dora_dynamics as dd

if TYPE_CHECKING:
    import pandas as pd

LAYERS: Final = 12
UNITS: Final = 48
INPUTS: Final = 384
RANK: Final = 4
SEED: Final = 0


class Layer(nn.Module):
    """One query projection."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(INPUTS, UNITS, bias=False)


class SmallModel(nn.Module):
    """Twelve projections whose pre-trained magnitudes m_0 grow from 0.7 to 1.5."""

    def __init__(self, seed: int = SEED) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        scale = 0.6 / (INPUTS * RANK) ** 0.5
        self.targets = []
        for layer, magnitude in zip(self._queries(), torch.linspace(0.7, 1.5, LAYERS), strict=True):
            start = torch.randn(UNITS, INPUTS, generator=source)
            with torch.no_grad():
                layer.weight.copy_(magnitude * start / start.norm(dim=1, keepdim=True))
            left = torch.randn(UNITS, RANK, generator=source)
            change = left @ torch.randn(RANK, INPUTS, generator=source)
            self.targets.append(layer.weight.detach() + scale * change)

    def _queries(self) -> list[nn.Linear]:
        return [cast("Layer", layer).query for layer in self.layers]

    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        """Squared error of every layer's outputs, summed over the layers."""
        errors = [
            (query(inputs) - inputs @ target.T).square().mean()
            for query, target in zip(self._queries(), self.targets, strict=True)
        ]
        return torch.stack(errors).sum()


def train(
    method: str,
    *,
    steps: int = 60,
    learning_rate: float = 2e-3,
    total_decay: float = 0.0,
    gradients: list[list[torch.Tensor]] | None = None,
    seed: int = SEED,
) -> tuple[pd.DataFrame, list[list[torch.Tensor]]]:
    """Trains the small model with AdamW and records it.

    Args:
        method: "FT", "LoRA" or "DoRA".
        steps: optimizer steps.
        learning_rate: constant.
        total_decay: Λ = Σ lr · weight_decay over the run.
        gradients: those of an earlier run, to take the very same updates again; else the loss's.
        seed: of the model, of A and of the inputs.

    Returns:
        The trajectory, four records of each layer after step 0, and the gradients of every step.
    """
    model = SmallModel(seed)
    source = torch.Generator().manual_seed(seed + 1)
    if method == "LoRA":
        dd.apply_lora(model, ["query"], rank=RANK, alpha=RANK, generator=source)
    elif method == "DoRA":
        dd.apply_dora(model, ["query"], rank=RANK, alpha=RANK, generator=source)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = total_decay / (steps * learning_rate)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=decay)
    recorder = dd.Recorder(model, ["query"], every=max(1, steps // 4), method=method)
    seen = []
    with recorder.attach(optimizer):
        for step in range(steps):
            optimizer.zero_grad()
            if gradients is None:
                model.loss(torch.randn(64, INPUTS, generator=source)).backward()  # type: ignore[no-untyped-call]
            else:
                for parameter, gradient in zip(trained, gradients[step], strict=True):
                    parameter.grad = gradient.clone()
            seen.append([p.grad.clone() for p in trained if p.grad is not None])
            optimizer.step()
    return recorder.trajectory, seen
