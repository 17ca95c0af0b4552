"""The parameter that weight decay shrinks, remembered until it may be another one."""

from __future__ import annotations

import torch
from torch import nn

from dora_dynamics.recording.followed import Followed, MagnitudeParameters


def test_a_magnitude_parameter_is_looked_up_again_where_it_may_have_changed() -> None:
    layers = {name: nn.Linear(3, 2) for name in ("trains", "frozen", "replaced")}
    layers["frozen"].requires_grad_(False)
    known = MagnitudeParameters({n: Followed(layer, "weight") for n, layer in layers.items()})
    for layer in layers.values():
        layer.weight.grad = torch.zeros(2, 3) if layer.weight.requires_grad else None
    before = {name: known.of(name) for name in layers}
    assert all(before[name] is layer.weight for name, layer in layers.items())

    layers["replaced"].weight.grad = None  # as where an adapter's m was switched for another's
    for layer in layers.values():
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert known.of("trains") is before["trains"]  # still trained: its gradient says so
    assert known.of("frozen") is before["frozen"]
    assert known.of("replaced") is layers["replaced"].weight
    before["frozen"].requires_grad_(True)  # type: ignore[union-attr]
    assert known.of("frozen") is layers["frozen"].weight
    known.forget()
    assert known.of("trains") is layers["trains"].weight
