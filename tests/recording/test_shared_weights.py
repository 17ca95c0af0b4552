"""W_0 is what it was, also where something that trains lies in the same memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.recording.memory import overlapping


def two_layers() -> list[nn.Linear]:
    return [nn.Linear(5, 7), nn.Linear(7, 3)]


def trained(
    layers: list[nn.Linear], recorder: dd.Recorder, rewrap_at: int | None = None
) -> torch.Tensor:
    """Train six steps, and return how far each weight has come by the norm."""
    model = nn.Sequential(*layers)
    start = [layer.weight.detach().clone() for layer in layers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with recorder.attach(optimizer):
        for step in range(6):
            if step == rewrap_at:
                layers[0].weight = nn.Parameter(layers[0].weight.data)
                optimizer.add_param_group({"params": [layers[0].weight]})
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()
    pairs = zip(layers, start, strict=True)
    return torch.stack([(layer.weight - before).norm() for layer, before in pairs]).detach()


def check(recorder: dd.Recorder, expected: torch.Tensor) -> None:
    found = recorder.trajectory.query("step == 6")["update_norm"].tolist()
    assert found == pytest.approx(expected.tolist(), rel=1e-5)
    assert min(found) > 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("place", ["device", "host"])
def test_with_the_model_s_own_state_dict_for_a_baseline(frozen: bool, place: Any) -> None:
    layers = two_layers()
    model = nn.Sequential(*layers).requires_grad_(not frozen)
    recorder = dd.Recorder(
        model, ["0", "1"], baseline=model.state_dict(), baseline_place=place, method="FT"
    )
    model.requires_grad_(True)
    check(recorder, trained(layers, recorder))


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("rewrap_at", [0, 3])
def test_of_a_frozen_weight_that_trains_as_another_parameter(every: int, rewrap_at: int) -> None:
    layers = two_layers()
    model = nn.Sequential(*layers)
    layers[0].weight.requires_grad_(False)
    recorder = dd.Recorder(model, ["0", "1"], every=every, method="FT")
    check(recorder, trained(layers, recorder, rewrap_at))


def test_of_a_frozen_weight_that_was_another_parameter_before_training() -> None:
    layers = two_layers()
    model = nn.Sequential(*layers).requires_grad_(False)
    recorder = dd.Recorder(model, ["0", "1"], method="FT")
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach())
    check(recorder, trained(layers, recorder))


def flat(layers: list[nn.Linear]) -> nn.Parameter:
    """One parameter that trains, the frozen weights being pieces of it, as Apex keeps them."""
    whole = nn.Parameter(torch.cat([layer.weight.detach().reshape(-1) for layer in layers]))
    pieces = whole.data.split([layer.weight.numel() for layer in layers])
    for layer, piece in zip(layers, pieces, strict=True):
        layer.weight = nn.Parameter(piece.view(layer.weight.shape), requires_grad=False)
    return whole


@pytest.mark.parametrize("how", ["some rows", "flat", "moved there", "in its place"])
def test_of_frozen_weights_in_the_midst_of_what_trains(how: str) -> None:
    layers = two_layers()
    model = nn.Sequential(*layers).requires_grad_(False)
    spare = flat(layers) if how == "flat" else nn.Parameter(torch.zeros(2))
    start = [layer.weight.detach().clone() for layer in layers]
    recorder = dd.Recorder(model, ["0", "1"], every=100, method="FT")
    optimizer = torch.optim.SGD([spare, *model.parameters()], lr=0.1)
    with recorder.attach(optimizer):
        for step in range(4):
            if step == 2 and how == "some rows":
                spare = nn.Parameter(layers[0].weight.data[3:5])
                optimizer.param_groups[0]["params"][0] = spare
            elif step == 2 and how == "moved there":
                spare.grad, spare.data = None, layers[0].weight.data
            elif step == 2 and how == "in its place":
                layers[0].weight = spare = nn.Parameter(layers[0].weight.data)
                optimizer.param_groups[0]["params"][1] = spare
            spare.grad = torch.ones_like(spare)
            optimizer.step()
    expected = torch.stack(
        [(layer.weight - before).norm() for layer, before in zip(layers, start, strict=True)]
    ).tolist()
    found = recorder.trajectory.query("step == 4")["update_norm"].tolist()
    assert found == pytest.approx(expected, rel=1e-5)
    assert [distance > 0 for distance in found] == [True, how == "flat"]


def test_that_another_optimizer_has_trained_is_told() -> None:
    layers = two_layers()
    model = nn.Sequential(*layers)
    layers[1].weight.requires_grad_(False)
    recorder = dd.Recorder(model, ["0", "1"], every=100, method="FT")
    watched, other = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers)
    with recorder.attach(watched):
        layers[1].weight.requires_grad_(True)
        model(torch.randn(4, 5)).square().mean().backward()
        other.step()
        with pytest.warns(UserWarning, match="weight of 1 was changed in place .* all optimizers"):
            watched.step()


def test_overlapping_memory_is_what_numpy_finds_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    memory = torch.zeros(100)

    def pieces(count: int) -> list[torch.Tensor]:
        cuts = torch.randint(0, 60, (count, 3), generator=generator).tolist()
        return [memory.as_strided((n % 5, m % 4), (9, 2), first) for first, n, m in cuts]

    for _ in range(100):
        weights = {str(i): piece for i, piece in enumerate(pieces(6))}
        others = [torch.empty(3), *pieces(3), torch.empty(2, 3, device="meta")]
        numbers = [other.numpy() for other in others[:-1] if other.numel()]
        expected = [
            name
            for name, weight in weights.items()
            if weight.numel() and any(np.may_share_memory(weight.numpy(), n) for n in numbers)
        ]
        assert overlapping(weights, others) == expected
