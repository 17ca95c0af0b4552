"""Weights that are frozen, unfrozen, merged or parametrized, measured from the right W_0."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.adapters import DoRA, adapter_of, pretrained_weight
from dora_dynamics.errors import InputError
from tests.recording.training import TARGETS, adamw, adapt, assert_same, tensors_held, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


class Adapter(nn.Module):
    """A wrapper around the layer that it adapts, of a method that nobody has named."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.gain = nn.Parameter(torch.ones(base.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(self.gain * x)
        return y


class TestBaseline:
    @pytest.mark.parametrize("method", ["LoRA", "DoRA"])
    @pytest.mark.parametrize("adapt_first", [True, False])
    @pytest.mark.parametrize("hand_over_everything", [True, False])
    def test_frozen_weights_are_not_copied(
        self,
        method: str,
        adapt_first: bool,
        hand_over_everything: bool,
        tiny_transformer: Build,
        train: Train,
    ) -> None:
        model = tiny_transformer()
        if adapt_first:
            adapt(model, method)
        recorder = dd.Recorder(model, TARGETS, every=1)
        adapt(model, method) if not adapt_first else None
        parameters = [p for p in model.parameters() if p.requires_grad or hand_over_everything]
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
            frozen = {
                pretrained_weight(module).data_ptr()
                for module in model.modules()
                if adapter_of(module) is not None
            }
            held = {tensor.data_ptr() for tensor in tensors_held(recorder)}
            own = {parameter.data_ptr() for parameter in model.parameters()}
        assert len(frozen) == 4
        assert frozen <= held <= own
        assert {tensor.data_ptr() for tensor in tensors_held(recorder)} == frozen
        assert recorder.trajectory.query("step == 3")["delta_direction"].min() > 0

    def test_weights_unfrozen_during_training_keep_their_baseline(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        model = tiny_transformer()
        queries = [p for n, p in model.named_parameters() if "query" in n]
        for parameter in queries:
            parameter.requires_grad_(False)
        before = copy.deepcopy(model)
        recorder = dd.Recorder(model, TARGETS, every=1)
        optimizer = adamw(model)

        def unfreeze(step: int) -> None:
            if step == 2:
                for parameter in queries:
                    parameter.requires_grad_(True)
                optimizer.add_param_group({"params": queries})

        with recorder.attach(optimizer):
            train(model, optimizer, 4, after_step=unfreeze)
        query = recorder.trajectory.query("role == 'query' and layer == 1").set_index("step")
        assert (query["update_norm"].loc[:2] == 0).all()
        expected = dd.weight_change(
            weight_of(before, "layers.1.query"), weight_of(model, "layers.1.query")
        )
        assert query["update_norm"].loc[4] == pytest.approx(expected.update_norm)
        assert expected.update_norm > 0

    def test_a_baseline_that_was_lost_once_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Taken at the step after, it would be a weight that has trained already."""
        model = nn.ModuleDict({"query": nn.Linear(3, 2)}).requires_grad_(False)
        recorder = dd.Recorder(model, ["query"], every=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

        def step() -> None:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

        def full(*_: object) -> None:
            raise MemoryError("no room")

        with recorder.attach(optimizer):
            optimizer.step()
            model.requires_grad_(True)
            with monkeypatch.context() as patch:
                patch.setattr(recorder._baseline, "_taken", full)
                with pytest.warns(UserWarning, match=r"no room.*W_0 is lost, and nothing more"):
                    step()
            step()
        assert recorder.trajectory["step"].tolist() == [0, 1]

    def test_weights_changed_below_an_adapter_are_warned_about(
        self, tiny_transformer: Build
    ) -> None:
        model = adapt(tiny_transformer(), "LoRA")
        recorder = dd.Recorder(model, ["layers.0.query"])
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        with pytest.warns(UserWarning, match=r"layers\.0\.query was changed in place"):
            recorder.record()

    def test_optimizer_that_trains_nothing_followed(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        optimizer = adamw(model)
        recorder = dd.Recorder(model, ["query"])
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        elsewhere = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
        with (
            pytest.warns(UserWarning, match="trains no parameter of the followed weights"),
            recorder.attach(elsewhere),
        ):
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with dd.Recorder(model, ["query"]).attach(optimizer):
                pass

    def test_optimizer_made_before_the_adapter(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        optimizer = adamw(model)
        recorder = dd.Recorder(adapt(model, "LoRA"), ["query"])
        with (
            pytest.warns(
                UserWarning, match=r"trains no parameter .* after the adapters are applied"
            ),
            recorder.attach(optimizer),
        ):
            pass

    def test_attached_outside_a_with_statement(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"])
        with pytest.warns(UserWarning, match="write `with recorder.attach") as caught:
            recorder.attach(adamw(model))
        assert caught[0].filename == __file__
        assert not recorder.is_attached

    def test_attached_to_no_optimizer(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"])
        attached = recorder.attach(model)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="attached to the optimizer"), attached:
            pass

    def test_merging_while_attached_measures_the_merged_weight(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        model = adapt(tiny_transformer(), "DoRA")
        recorder = dd.Recorder(model, TARGETS, every=100)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
            before = copy.deepcopy(model)
            dd.merge(model)
        expected = dd.Recorder(before, TARGETS)
        expected.step = 3
        expected.record()
        np.testing.assert_allclose(
            recorder.trajectory.query("step == 3")["delta_direction"],
            expected.trajectory["delta_direction"],
            rtol=1e-4,
        )


class TestForeignParametrizations:
    """Weights that a parametrization of torch's own computes."""

    def test_spectral_norm_is_not_disturbed(self, tiny_transformer: Build, train: Train) -> None:
        results = []
        for watch in (False, True):
            model = tiny_transformer()
            for layer in ("layers.0.query", "layers.1.query"):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(3)
                    nn.utils.parametrizations.spectral_norm(model.get_submodule(layer))
            optimizer = adamw(model)
            torch.manual_seed(0)
            if watch:
                recorder = dd.Recorder(model, ["query"], every=1, method="spectral")
                with recorder.attach(optimizer):
                    train(model, optimizer, 4)
                assert recorder.trajectory.query("step == 0")["update_norm"].max() == 0
                assert recorder.trajectory.query("step == 4")["update_norm"].min() > 0
                assert recorder.trajectory["total_decay"].iloc[-2:].isna().all()
            else:
                train(model, optimizer, 4)
            results.append(model.state_dict())
        assert_same(results[0], results[1])

    def test_weight_norm_inside_a_cache(self, tiny_transformer: Build, train: Train) -> None:
        model = tiny_transformer()
        nn.utils.parametrizations.weight_norm(model.get_submodule("layers.0.query"))
        recorder = dd.Recorder(model, ["layers.0.query"], every=1, method="weight norm")
        optimizer = adamw(model)
        tokens = torch.arange(33).view(3, 11) % 11
        with recorder.attach(optimizer):
            for _ in range(2):
                with nn.utils.parametrize.cached():
                    recorder.step += 1
                    recorder.record()
                    optimizer.zero_grad()
                    torch.autograd.backward(model(tokens).square().sum())
                gradients = [p.grad for n, p in model.named_parameters() if "layers.0.query" in n]
                assert all(g is not None and g.abs().max() > 0 for g in gradients)

    def test_unknown_method_must_be_named(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        dd.apply_lora(model, ["layers.0.query"])
        assert dd.Recorder(model, ["query"]).method == "LoRA"  # the other query is frozen
        model.get_submodule("layers.1.query").requires_grad_(True)
        with pytest.raises(ValueError, match=r"several methods \(FT, LoRA\): pass method="):
            dd.Recorder(model, ["query"])
        assert dd.Recorder(model, ["query"], method="half").method == "half"
        model.query = Adapter(nn.Linear(3, 5))
        with pytest.raises(InputError, match=r"an? Adapter has no known name: .* by method="):
            dd.Recorder(model, ["query"])


def test_magnitude_of_a_dora_weight_is_m(tiny_transformer: Build, train: Train) -> None:
    model = adapt(tiny_transformer().double(), "DoRA")
    recorder = dd.Recorder(model, ["layers.0.query"])
    module = model.get_submodule("layers.0.query")
    adapter = adapter_of(module)
    assert isinstance(adapter, DoRA)
    with torch.no_grad():
        adapter.magnitude[2] *= -1
    optimizer = adamw(model)
    with recorder.attach(optimizer):
        train(model, optimizer, 3)
    m, m0 = adapter.magnitude.detach().abs().numpy(), dd.magnitude(pretrained_weight(module))
    last = recorder.trajectory.iloc[-1]
    assert last["delta_magnitude"] == pytest.approx(np.abs(m - m0).mean(), rel=1e-12)
    assert last["delta_direction"] > 1.9 / 6
