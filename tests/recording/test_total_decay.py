"""Λ in the table is what the optimizer's weight decay took."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from tests.recording.training import METHODS, TARGETS, adamw, adapt

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


class TestTotalDecay:
    def test_equals_the_sum_of_rate_times_decay_under_a_schedule(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        for method in METHODS:
            model = adapt(tiny_transformer(), method)
            recorder = dd.Recorder(model, TARGETS, every=1)
            optimizer = adamw(model, lr=0.02, weight_decay=0.3)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
            rates = [0.0]

            def step(_: int) -> None:
                rates.append(seen[-1])  # noqa: B023
                scheduler.step()  # noqa: B023
                seen.append(float(optimizer.param_groups[0]["lr"]))  # noqa: B023

            seen = [float(optimizer.param_groups[0]["lr"])]
            with recorder.attach(optimizer):
                train(model, optimizer, 6, after_step=step)
            expected = np.cumsum(rates) * 0.3 * (method != "LoRA")
            for _, path in recorder.trajectory.groupby("site"):
                np.testing.assert_allclose(path["total_decay"], expected, rtol=1e-12)

    @pytest.mark.parametrize("before", ["FT", "frozen", "LoRA", "DoRA"])
    def test_does_not_depend_on_when_a_replaced_weight_is_recorded(self, before: str) -> None:
        """The parameter that was there keeps its last gradient: it looks as if it trained."""
        found = {}
        for every in (1, 100):
            layers = [nn.Linear(5, 7), nn.Linear(5, 7)]
            model = nn.ModuleDict(dict(zip(TARGETS, layers, strict=True)))
            adapt(model, before)
            model.requires_grad_(before == "FT")
            for name, parameter in model.named_parameters():
                if before in ("LoRA", "DoRA") and "original" not in name:
                    parameter.requires_grad_(True)
            recorder = dd.Recorder(model, TARGETS, every=every, method=before)
            spare = nn.Parameter(torch.zeros(1))
            optimizer = torch.optim.AdamW([*model.parameters(), spare], lr=0.01, weight_decay=0.1)
            expected = 0.0
            with recorder.attach(optimizer):
                for step in range(8):
                    if step == 3:
                        if before in ("LoRA", "DoRA"):
                            dd.merge(model)
                        for layer in layers:
                            layer.weight = nn.Parameter(layer.weight.detach().clone())
                        optimizer.param_groups[0]["params"] = list(model.parameters())
                    optimizer.zero_grad()
                    (
                        sum(layer(torch.randn(3, 5)).sum() for layer in layers) + spare.sum()
                    ).backward()
                    optimizer.step()
                    expected += 0.01 * 0.1 * (step >= 3 or before in ("FT", "DoRA"))
            last = recorder.trajectory.query("step == 8")["total_decay"].tolist()
            found[every] = last
            np.testing.assert_allclose(last, expected, rtol=1e-12)
        assert found[1] == found[100]

    def test_shrinks_what_it_says_it_shrinks(self, tiny_transformer: Build) -> None:
        """With gradients of zero, AdamW's decay is all that happens: Λ is the relative ΔM."""
        for method in METHODS:
            model = adapt(tiny_transformer().double(), method)
            recorder = dd.Recorder(model, TARGETS, every=1)
            optimizer = adamw(model, lr=1e-4, weight_decay=0.1)
            with recorder.attach(optimizer):
                for _ in range(3):
                    for parameter in model.parameters():
                        parameter.grad = torch.zeros_like(parameter)
                        if not parameter.requires_grad:
                            parameter.grad = None
                    optimizer.step()
            last = recorder.trajectory.query("step == 3")
            np.testing.assert_allclose(
                last["relative_delta_magnitude"], last["total_decay"], rtol=1e-4, atol=1e-14
            )

    @pytest.mark.parametrize(
        ("optimizer_class", "options", "expected"),
        [
            (torch.optim.Adam, {"weight_decay": 0.1}, np.nan),
            (torch.optim.Adam, {"weight_decay": 0.0}, 0.0),
            (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, 0.003),
            (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, 0.003),
            (torch.optim.NAdam, {"weight_decay": 0.1}, np.nan),
            (torch.optim.SGD, {}, 0.0),
            (torch.optim.AdamW, {"weight_decay": 0.1}, 0.003),
        ],
    )
    def test_nan_where_decay_is_coupled(
        self,
        optimizer_class: Any,
        options: dict[str, Any],
        expected: float,
        tiny_transformer: Build,
        train: Train,
    ) -> None:
        if not options.keys() <= inspect.signature(optimizer_class).parameters.keys():
            pytest.skip("this torch has no such option")
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"])
        optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
        np.testing.assert_allclose(
            recorder.trajectory.query("step == 3")["total_decay"], expected, rtol=1e-12
        )

    def test_groups_without_decay(self, tiny_transformer: Build, train: Train) -> None:
        model = tiny_transformer()
        named = dict(model.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if "query" in n], "weight_decay": 0.0},
            {"params": [p for n, p in named.items() if "query" not in n], "weight_decay": 0.5},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        recorder = dd.Recorder(model, TARGETS)
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        last = recorder.trajectory.query("step == 2").groupby("role")["total_decay"].max()
        assert last["query"] == 0
        assert last["value"] == pytest.approx(2 * 0.01 * 0.5)
