"""Λ added up by group and settled late is, to the bit, what looking at each tensor finds."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.recording import Watch
from dora_dynamics.recording.followed import Followed
from tests.conftest import campaign

if TYPE_CHECKING:
    from torch.optim import Optimizer


def share(optimizer: Optimizer, parameter: torch.Tensor | None) -> float:
    """What a step takes off a parameter, by going through all groups."""
    if parameter is None:
        decays = any(g["weight_decay"] != 0 and g["params"] for g in optimizer.param_groups)
        return math.nan if decays else 0.0
    for group in optimizer.param_groups:
        if any(parameter is other for other in group["params"]) and group["weight_decay"] != 0:
            if parameter.grad is None:
                return 0.0
            is_known = isinstance(optimizer, torch.optim.AdamW)
            return float(group["lr"]) * group["weight_decay"] if is_known else math.nan
    return 0.0


class Training:
    """Layers, bare and adapted, with two optimizers, and changes to them that come at random."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleDict({f"query_{i}": nn.Linear(3, 2, bias=False) for i in range(9)})
        dd.apply_lora(self.layers, ["query_6"], rank=1)
        dd.apply_dora(self.layers, ["query_7", "query_8"], rank=1)
        for i in range(5):
            self.layers[f"query_{i}"].requires_grad_(True)
        nn.utils.parametrizations.weight_norm(self.layers["query_5"])
        self.followed = {n: Followed(layer, "weight") for n, layer in self.layers.items()}
        given = [p for p in self.layers.parameters() if self.rng.random() < 0.9]
        cut = self.rng.randrange(3, len(given) - 2)
        rate: Any = torch.tensor(0.01) if self.rng.random() < 0.3 else 0.01
        second = torch.optim.SGD if self.rng.random() < 0.2 else torch.optim.AdamW
        decay = self.rng.choice([0.0, 0.1])
        groups: list[dict[str, Any]] = [
            {"params": given[:2], "weight_decay": 0.3},
            {"params": given[2:cut]},
        ]
        self.optimizers: list[Optimizer] = [
            torch.optim.AdamW(groups, lr=rate, weight_decay=0.1, foreach=False),
            second(given[cut:], lr=0.02, weight_decay=decay),
        ]
        self.set_gradients()

    def set_gradients(self) -> None:
        for parameter in self.layers.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def change(self) -> None:
        """One thing that may happen between two steps."""
        layer: Any = self.rng.choice([self.layers[f"query_{i}"] for i in range(5)])
        group = self.rng.choice(self.rng.choice(self.optimizers).param_groups)
        known = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        kind = self.rng.randrange(8)
        if kind == 0:
            layer.weight.grad = None
        elif kind == 1:
            self.set_gradients()
        elif kind == 2:
            layer.requires_grad_(not layer.weight.requires_grad)
            layer.weight.grad = None
        elif kind == 3:
            layer.weight.requires_grad_(True)  # what a frozen one is replaced by, is not seen
            layer.weight.grad = None
            layer.weight = nn.Parameter(layer.weight.detach().clone())
            if self.rng.random() < 0.7:
                self.rng.choice(self.optimizers).add_param_group({"params": [layer.weight]})
            self.set_gradients()
        elif kind == 4 and not any(layer.weight is other for other in known):
            group_options = {"params": [layer.weight], "weight_decay": self.rng.choice([0.0, 0.7])}
            self.rng.choice(self.optimizers).add_param_group(group_options)
        elif kind == 5:
            group["weight_decay"] = self.rng.choice([0.0, 0.05, 0.2])
        elif kind == 6 and group["params"]:
            group["params"].pop(self.rng.randrange(len(group["params"])))
        elif kind == 7:  # also of one that is frozen: what is left of the steps before
            layer.weight.grad = torch.zeros_like(layer.weight)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(campaign(20, 2_000)))
def test_is_what_looking_at_each_tensor_at_each_step_finds(seed: int) -> None:
    training = Training(seed)
    rng = training.rng
    watch = Watch(training.followed)
    expected = dict.fromkeys(training.followed, 0.0)
    for _ in range(60):
        if rng.random() < 0.25:
            training.change()
        optimizer = rng.choice(training.optimizers)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * rng.uniform(0.9, 1.1)
        watch.add_decay(optimizer)
        for name, where in training.followed.items():
            expected[name] += share(optimizer, where.magnitude())
        if rng.random() < 0.2:  # a record
            found = watch.total_decay
            watch.look_again()
            assert {n: v.hex() for n, v in found.items()} == {
                n: v.hex() for n, v in expected.items()
            }
    watch.end()
    assert {n: v.hex() for n, v in watch.total_decay.items()} == {
        n: v.hex() for n, v in expected.items()
    }


def test_two_optimizers_that_take_turns_both_count() -> None:
    layers = nn.ModuleDict({"query": nn.Linear(3, 2), "value": nn.Linear(3, 2)})
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    watch = Watch({name: Followed(layer, "weight") for name, layer in layers.items()})
    first = torch.optim.AdamW(layers["query"].parameters(), lr=0.5, weight_decay=0.25)
    second = torch.optim.AdamW(layers.parameters(), lr=0.25, weight_decay=0.25)
    for _ in range(4):
        watch.add_decay(first)
        watch.add_decay(second)
    assert watch.total_decay == {"query": 4 * 0.1875, "value": 4 * 0.0625}


def test_what_was_lost_stays_lost_and_is_not_looked_for() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.zeros(2, 3)
    watch = Watch({"query": Followed(layer, "weight")})
    optimizer = torch.optim.AdamW([layer.weight], lr=0.5, weight_decay=0.5)
    watch.add_decay(optimizer)
    watch.forget_decay()
    watch.add_decay(optimizer)
    assert math.isnan(watch.total_decay["query"])
    watch.total_decay = {"query": 0.125}  # as a checkpoint knows it
    watch.add_decay(optimizer)
    assert watch.total_decay == {"query": 0.375}


def test_a_frozen_weight_that_trains_is_looked_for_again() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.requires_grad_(False)
    watch = Watch({"query": Followed(layer, "weight")})
    other = nn.Parameter(torch.zeros(2, 3))
    other.grad = torch.zeros(2, 3)
    optimizer = torch.optim.AdamW([other], lr=0.5, weight_decay=0.5)
    for _ in range(2):
        watch.add_decay(optimizer)
    assert watch.total_decay == {"query": 0.0}
    before.requires_grad_(True)
    layer.weight = other
    watch.add_decay(optimizer)
    assert watch.total_decay == {"query": 0.25}
