"""How one method is trained; the paper's recipe where a short run allows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

METHODS: Final = ("FT", "LoRA", "DoRA")
LEARNING_RATES: Final = {"FT": 1e-4, "LoRA": 1e-3, "DoRA": 1e-3}
"""Peak learning rates of the paper's recipes (Table 9)."""

PAPER_TOTAL_DECAY: Final = {"FT": 0.044, "LoRA": 0.44, "DoRA": 0.735}
"""Λ = Σ lr·weight_decay of the paper's recipes (Table 9): lr · 0.01 · steps · ½ under a linear
schedule, with lr 1e-4 for FT and 1e-3 for the adapters, 88k steps (FT, LoRA) and 147k (DoRA)."""

OptimizerName: TypeAlias = Literal["adamw", "adam_l2", "adam", "sgd"]
DecayOn: TypeAlias = Literal["all", "magnitude", "factors", "none"]


@dataclass(frozen=True)
class Recipe:
    """How one method is trained.

    Attributes:
        method: "FT", "LoRA", "DoRA", or a name that the caller's own `adapt` knows.
        steps: optimizer steps.
        batch_size: pairs a step.
        learning_rate: peak of the linear schedule (Table 9).
        total_decay: Λ, the sum of lr · weight_decay over all steps.
        decay_on: which parameters decay: all that the paper's code decays (every trained one but
            biases, norms and the head), DoRA's magnitude alone, the factors A and B alone, none.
        optimizer: AdamW (decoupled decay), Adam with its decay in the gradient ("adam_l2"), Adam
            without decay, or SGD with momentum 0.9 and its decay in the gradient.
        rank: of LoRA's and DoRA's update; alpha equals it.
        roles: which projections carry the adapters.
        warmup: share of the steps with a rising learning rate.
        clip: largest norm of the gradient.
    """

    method: str
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 1e-3
    total_decay: float = 0.0
    decay_on: DecayOn = "all"
    optimizer: OptimizerName = "adamw"
    rank: int = 16
    roles: tuple[str, ...] = ("query", "value")
    warmup: float = 0.1
    clip: float = 5.0

    def schedule(self, step: int) -> float:
        """Factor on the learning rate in the step after `step` steps: linear up, linear down."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return (self.steps - step) / max(1, self.steps - rising)

    @property
    def weight_decay(self) -> float:
        """The optimizer's coefficient that gives `total_decay` under this schedule."""
        return self.total_decay / self.total_learning_rate

    @property
    def total_learning_rate(self) -> float:
        """Sum of the learning rate over all steps."""
        return self.learning_rate * math.fsum(map(self.schedule, range(self.steps)))
