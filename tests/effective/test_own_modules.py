"""Adapters nobody has seen: exposed by `.weight`, affine and probed, or read by a function."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils import parametrize

import dora_dynamics as dd
from dora_dynamics.adapters import LoRA
from dora_dynamics.effective import (
    NoDenseWeightError,
    dense_weight,
    method_of,
    registry,
    stored_parameter,
)
from dora_dynamics.effective.private_copy import private_copy
from dora_dynamics.sites import models
from tests.effective.training import losses
from tests.effective.waits import Waits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def forget_registrations() -> Iterator[None]:
    functions, classes = dict(registry._functions), list(models._linear_classes)
    yield
    registry._functions.clear()
    registry._functions.update(functions)
    models._linear_classes[:] = classes


class Gain(nn.Module):
    """As a parametrization: one factor per output."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(outputs, 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.gain * weight


class Rotated(nn.Module):
    """A wrapper that turns the input before the frozen layer: affine, and exposes no weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.turn = nn.Parameter(torch.zeros(base.in_features, base.in_features))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x + self.dropout(x) @ (self.turn - self.turn.T)
        y: torch.Tensor = self.base_layer(turned)
        return y


class Factored(nn.Linear):
    """As loralib does it: `.weight` is the frozen base, and the factors lie beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.A = nn.Parameter(torch.randn(2, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.A.T @ self.B.T


class Gated(Rotated):
    """Not affine: the update depends on the input in more than one way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)
        return y * torch.sigmoid(y)


class Opaque(nn.Module):
    """Tells neither its weight nor its size."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.inner = base.requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(base.out_features, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x) * self.gain.T
        return y


class Net(nn.Module):
    """Two layers, of which the first is the one that is adapted."""

    def __init__(self, query: nn.Module | None = None) -> None:
        super().__init__()
        self.query: Any = query or nn.Linear(6, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.query(x).tanh())
        return y


def run(model: nn.Module, recorder: dd.Recorder | None) -> list[float]:
    torch.manual_seed(4)
    return losses(model, recorder, lambda: torch.randn(5, 6), lr=0.05)


def test_a_parametrization_needs_nothing() -> None:
    torch.manual_seed(0)
    model = Net()
    before = model.query.weight.detach().clone()
    parametrize.register_parametrization(model.query, "weight", Gain(9))
    recorder = dd.Recorder(model, ["query"], every=1, method="gain")
    run(model, recorder)
    row: Any = recorder.trajectory.query("step == 3").iloc[0]
    change = dd.weight_change(before, model.query.weight.detach())
    assert row["delta_direction"] == pytest.approx(change.delta_direction, rel=1e-6)
    assert change.update_norm > 0


@pytest.mark.parametrize("kind", [Rotated, Factored])
def test_an_affine_module_is_probed(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    query: Any = Rotated(nn.Linear(6, 9)) if kind is Rotated else Factored(6, 9)
    model = Net(query)
    other = copy.deepcopy(model)
    recorder = dd.Recorder(model, ["query"], every=1, method="mine")
    before = dense_weight(query)
    assert run(model, recorder) == run(other, None)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    query.eval()
    with torch.no_grad():
        expected = (query(torch.eye(6)) - query(torch.zeros(1, 6))).T
    torch.testing.assert_close(dense_weight(query).float(), expected, rtol=1e-5, atol=1e-6)
    row: Any = recorder.trajectory.query("step == 3").iloc[0]
    change = dd.weight_change(before.double(), dense_weight(query).double())
    assert row["update_norm"] == pytest.approx(change.update_norm, rel=1e-6)
    assert change.update_norm > 0
    assert method_of(query) is None


def test_a_registered_function_is_asked() -> None:
    torch.manual_seed(0)
    model = Net(Opaque(nn.Linear(6, 9)))
    with pytest.raises(NoDenseWeightError, match=r"Opaque exposes no \.weight"):
        dense_weight(model.query)
    model.query.in_features, model.query.out_features = 6, 9

    def read(module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.gain * module.inner.weight
        return weight

    dd.register_effective_weight(Opaque, read)
    recorder = dd.Recorder(model, ["query"], every=1, method="mine")
    run(model, recorder)
    change = dd.weight_change(model.query.inner.weight, read(model.query).detach())
    row: Any = recorder.trajectory.query("step == 3").iloc[0]
    assert row["delta_magnitude"] == pytest.approx(change.delta_magnitude, rel=1e-6)
    assert row["delta_magnitude"] > 0


LOOKS: dict[str, Callable[[torch.Tensor], object]] = {
    "a number": lambda w: w.sum().item(),
    "a truth": lambda w: bool((w == w).all()),
    "a comparison": lambda w: torch.equal(w, w),
    "a mask": lambda w: w[w > 0],
    "an assignment by a mask": lambda w: w.clone().__setitem__(w > 0, 0.0),
    "where": torch.nonzero,
    "a list": lambda w: w.tolist(),
    "a copy": lambda w: w.cpu(),
    "a solution": lambda w: torch.linalg.solve(w @ w.T + torch.eye(9), w),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_would_wait_for_a_gpu_is_counted(look: Callable[[torch.Tensor], object]) -> None:
    """The count of `test_peft_tuners.py` can fail: here a user's own function looks."""

    def read(module: Any, look: Callable[[torch.Tensor], object] = lambda w: w) -> torch.Tensor:
        weight: torch.Tensor = module.gain * module.inner.weight
        look(weight)
        return weight

    model = Net(Opaque(nn.Linear(6, 9)))
    model.query.in_features, model.query.out_features = 6, 9
    found = []
    for does in (look, abs):
        dd.register_effective_weight(Opaque, partial(read, look=does))
        recorder = dd.Recorder(model, ["query"], method="mine")
        with Waits() as waits:
            recorder.record()
        found.append(sum(waits.found.values()))
    assert found == [1, 0]


def test_an_affine_module_that_stands_alone() -> None:
    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 6, 9
            self.A = nn.Linear(6, 4)
            self.B = nn.Linear(4, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.B(self.A(x))
            return y

    torch.manual_seed(0)
    dd.register_linear(TwoLayers)
    model = Net(TwoLayers())
    expected = model.query.B.weight.double() @ model.query.A.weight.double()
    torch.testing.assert_close(dense_weight(model.query), expected.detach(), rtol=0, atol=1e-13)
    recorder = dd.Recorder(model, ["query"], every=1, method="mine")
    run(model, recorder)
    assert [site.name for site in recorder.sites] == ["query"]
    assert recorder.trajectory["update_norm"].max() > 0


class Growing(nn.Module):
    """Affine at its start, and less and less so as its gate trains."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        return y * (1 + self.gate * torch.tanh(y))


def test_a_module_that_is_affine_no_more_costs_its_own_rows_only() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"query": Growing(nn.Linear(6, 9)), "value": nn.Linear(9, 4)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    recorder = dd.Recorder(model, ["query", "value"], every=1, method="mine")
    told = pytest.warns(UserWarning, match="query cannot be measured.*Growing is not affine")
    with told, recorder.attach(optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model["value"](model["query"](torch.randn(5, 6))).square().mean().backward()
            optimizer.step()
    rows: Any = recorder.trajectory.set_index(["step", "site"])["delta_magnitude"]
    assert rows[0, "query"] == 0
    assert rows[[(1, "query"), (2, "query")]].isna().all()
    assert rows[[(1, "value"), (2, "value")]].gt(0).all()


def test_a_module_that_is_not_affine_is_refused() -> None:
    with pytest.raises(NoDenseWeightError, match="Gated is not affine in its input"):
        dense_weight(Gated(nn.Linear(6, 9)))


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probing_is_exact(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Rotated(nn.Linear(*sizes)).to(dtype)
    nn.init.normal_(module.turn)
    turn = module.turn.double() - module.turn.double().T
    expected = module.base_layer.weight.double() @ (torch.eye(sizes[0]) + turn.T)
    torch.testing.assert_close(dense_weight(module), expected.detach(), rtol=0, atol=1e-13)


def test_reading_leaves_hooks_modes_and_random_state_alone() -> None:
    torch.manual_seed(0)
    module = Rotated(nn.Linear(6, 9))
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.base_layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    state = torch.get_rng_state()
    dense_weight(module)
    assert calls == []
    assert module.training
    assert module.dropout.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())
    assert module.turn.requires_grad


def test_private_copy_shares_nothing() -> None:
    module = Rotated(nn.Linear(6, 9))
    vars(module)["cache"] = {
        "kept": (module.turn * 2, [module.base_layer.weight])
    }  # not a graph leaf
    copied: Any = private_copy(module)
    mine = {p.data_ptr() for p in module.parameters()}
    assert mine.isdisjoint({p.data_ptr() for p in copied.parameters()})
    assert copied.cache["kept"][1][0] is copied.base_layer.weight
    assert {p.dtype for p in copied.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in copied.parameters())
    assert not copied.training


def test_tied_weights_stay_tied_in_a_copy() -> None:
    first = nn.Linear(6, 6)
    second = nn.Linear(6, 6)
    second.weight = first.weight
    copied: Any = private_copy(nn.Sequential(first, second))
    assert copied[0].weight is copied[1].weight


def test_a_plain_layer_is_not_copied() -> None:
    layer = nn.Linear(6, 9)
    assert dense_weight(layer).data_ptr() == layer.weight.data_ptr()
    assert stored_parameter(layer) is layer.weight


class InputGain(nn.Module, LoraLayer):
    """A custom module of PEFT's LoRA: its matrices, and a gain for each input."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, options["r"], options["lora_alpha"], options["config"])
        self.gain = nn.Parameter(torch.rand(7) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (name,) = self.active_adapters
        update: torch.Tensor = self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        y: torch.Tensor = self.base_layer(self.gain * x)
        return y + update


class GainedLoRA(LoRA):
    """LoRA of this package, and a gain for each input."""

    def __init__(self, weight: torch.Tensor, **options: Any) -> None:
        super().__init__(weight, **options)
        self.gain = nn.Parameter(torch.rand(weight.shape[1]) + 0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return super().forward(weight) * self.gain


class Pruned(nn.Linear):
    """A linear layer whose weight is masked in forward."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.mask: torch.Tensor
        self.register_buffer("mask", (torch.rand(outputs, inputs) < 0.5).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.mask * self.weight, self.bias)


def test_a_mask_in_a_buffer_is_seen() -> None:
    layer = Pruned(7, 5)
    weight = dense_weight(layer)
    torch.testing.assert_close(weight.float(), (layer.mask * layer.weight).detach())
    recorder = dd.Recorder(nn.Sequential(layer), ["0"], method="pruned FT")
    recorder.record()
    with torch.no_grad():
        layer.weight[layer.mask == 0] += 1.0  # of what the mask hides
    recorder.step = 1
    recorder.record()
    assert recorder.trajectory["update_norm"].max() == pytest.approx(0, abs=1e-6)


class TestDerivedFromKnownAdapters:
    def test_custom_module_of_peft_is_read_by_what_it_does(self) -> None:
        config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
        config._register_custom_module({nn.Linear: InputGain})
        model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(7, 5)), config)
        layer = model.base_model.model[0]
        x = torch.randn(4, 7)
        applied = layer(x) - layer.base_layer.bias
        torch.testing.assert_close(x @ dense_weight(layer).to(x).T, applied)
        assert method_of(layer) == "InputGain"
        recorder = dd.Recorder(model, ["0"])
        recorder.record()
        with torch.no_grad():
            expected = layer.base_layer.weight * layer.gain
            expected += layer.scaling["default"] * (
                layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            )
            change = expected.norm(dim=1) - layer.base_layer.weight.norm(dim=1)
        measured = recorder.trajectory["delta_magnitude"].item()
        assert measured == pytest.approx(change.abs().mean().item(), rel=1e-5)

    def test_derived_from_this_packages_lora(self) -> None:
        layer = nn.Linear(7, 5)
        lora = GainedLoRA(layer.weight, rank=2, alpha=2)
        nn.init.normal_(lora.lora_B)
        parametrize.register_parametrization(layer, "weight", lora)
        torch.testing.assert_close(dense_weight(layer), layer.weight.detach())
        assert method_of(layer) is None
        expected = layer.weight.detach().clone()
        torch.testing.assert_close(dd.merge(layer).weight, nn.Parameter(expected))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda module: module.base_layer.weight.T, r"shape \(7, 5\): .* has \(5, 7\)"),
        (lambda _: 3.0, "returns a float: it has to return the weight"),
    ],
)
def test_function_that_returns_no_weight(function: Callable[[nn.Module], Any], said: str) -> None:
    layer = Rotated(nn.Linear(7, 5))
    dd.register_effective_weight(Rotated, function)
    with pytest.raises(NoDenseWeightError, match=said):
        dense_weight(layer)
