"""A step is counted once, whoever calls it and however it is made."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.recording import Watch, watch

if TYPE_CHECKING:
    from collections.abc import Callable


class Base(torch.optim.AdamW):
    """As torch's own, which other tests make or not."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Derived(Base):
    """A step that calls that of the class above, then changes what that has done."""

    fails_at = -1

    def step(self, closure: Any = None) -> Any:
        self.fails_at -= 1
        found = super().step(closure)
        if self.fails_at == 0:
            raise ArithmeticError
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.125)
        return found


def layer() -> nn.Linear:
    found = nn.Linear(5, 3)
    found.weight.grad, found.bias.grad = torch.ones(3, 5), torch.ones(3)
    return found


def test_of_a_class_that_calls_the_step_of_the_class_above() -> None:
    """torch calls the hooks of both; the step that failed is none."""
    linear = layer()
    model = nn.Sequential(linear)
    Base(model.parameters())  # from here on its step calls hooks
    optimizer = Derived(model.parameters(), lr=0.01, weight_decay=0.1)
    before = linear.weight.detach().clone()
    recorder = dd.Recorder(model, ["0"], every=1)
    optimizer.fails_at = 3
    with recorder.attach(optimizer):
        for step in range(6):
            if step == 2:
                with pytest.raises(ArithmeticError):
                    optimizer.step()
            else:
                optimizer.step()
            if step == 4:
                halfway = float((linear.weight.detach() - before).norm())
    table = recorder.trajectory.set_index("step")
    assert list(table.index) == [0, 1, 2, 3, 4, 5]
    assert table["update_norm"][4] == pytest.approx(halfway, rel=1e-5)
    assert table["total_decay"].to_list() == pytest.approx([0.001 * step for step in range(6)])


def test_of_an_optimizer_that_is_given_twice() -> None:
    model = nn.Sequential(layer())
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = dd.Recorder(model, ["0"])
    recorder.start(optimizer, optimizer)
    optimizer.step()
    recorder.finish()
    assert recorder.step == 1


def test_of_one_optimizer_within_the_captured_step_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.ModuleList([layer(), layer()])
    captured, made = (torch.optim.SGD(one.parameters()) for one in model)
    is_captured = False
    monkeypatch.setattr(watch, "is_being_captured", lambda: is_captured)
    seen: list[Any] = []
    watching = Watch({})
    watching.begin([captured, made], lambda _: None, seen.append, lambda: seen.append("captured"))

    def closure() -> float:
        made.step()
        return 0.0

    made.step()
    is_captured = True
    captured.step(closure)
    is_captured = False
    assert seen == [made, "captured", "captured"]
    watching.end()
    captured.step()
    assert len(seen) == 3


@pytest.mark.filterwarnings("ignore")  # the compiler's: a recorder that failed has no row
def test_that_is_compiled() -> None:
    torch.compiler.reset()
    linear = layer()
    model = nn.Sequential(linear)
    before = linear.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), weight_decay=0.1)
    recorder = dd.Recorder(model, ["0"], every=1)
    step: Callable[[], object] = torch.compile(optimizer.step, backend="eager")
    with recorder.attach(optimizer):
        for _ in range(2):
            step()
    last = recorder.trajectory.query("step == 2").iloc[0]
    assert last["update_norm"] == pytest.approx(
        float((linear.weight.detach() - before).norm()), rel=1e-5
    )
    assert last["total_decay"] == pytest.approx(0.002)


def test_what_goes_wrong_is_told_at_the_line_of_the_user_s() -> None:
    layers = [nn.Linear(5, 3).requires_grad_(False), nn.Linear(3, 2).requires_grad_(False)]
    optimizer = torch.optim.SGD(nn.ModuleList(layers).parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 10)  # wraps the step
    recorder = dd.Recorder(
        nn.Sequential(*layers), ["*"], every=lambda step: 1 // (step - 1) > 2, method="FT"
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with recorder.attach(optimizer):
            for linear in layers:
                linear.weight.detach().add_(1.0)
            layers[1].requires_grad_(True)
            optimizer.step()
    words = ["weight of 1 was changed", "division or modulo by zero", "weight of 0 was changed"]
    for one, said in zip(told, words, strict=True):
        assert said in str(one.message)
        assert one.filename == __file__
