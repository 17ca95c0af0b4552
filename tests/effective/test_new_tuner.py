"""A tuner that a newer PEFT brings: it is tested, tabled and followed without a line about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

import dora_dynamics as dd
from analyses import support_table
from dora_dynamics import effective
from dora_dynamics.effective import NoDenseWeightError
from dora_dynamics.effective.peft_layers import method_name
from dora_dynamics.effective.peft_weights import how_read
from tests.effective import peft_cases, test_peft_tuners
from tests.effective.peft_cases import CASES, Case, Linears


@dataclass
class GainConfig(peft.PeftConfig):
    """As PEFT's own: a type, the modules it is put on, and a setting."""

    target_modules: Any = None
    gated: bool = field(default=False)
    exclude_modules: Any = None
    layers_to_transform: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft.PeftType("GAIN")
        self.target_modules = set(self.target_modules or [])


class GainLayer(nn.Module, BaseTunerLayer):
    """y = g ∘ (W_0 x) + b, one g for each output; merged as g ∘ W_0."""

    adapter_layer_names = ("gain_factor",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: GainConfig) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.gain_factor = nn.ParameterDict()
        self.gated = config.gated
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: Any = adapter_name
        self.update_layer(adapter_name)

    def update_layer(self, adapter_name: str) -> None:
        self.gain_factor[adapter_name] = nn.Parameter(torch.ones(self.base_layer.out_features))
        self.set_adapter(self.active_adapters)

    def factor(self) -> torch.Tensor:
        found = [
            self.gain_factor[name] for name in self.active_adapters if name in self.gain_factor
        ]
        return torch.stack(found).prod(0)

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        self.base_layer.weight.data *= self.factor()[:, None]
        self.merged_adapters += self.active_adapters

    def unmerge(self) -> None:
        self.base_layer.weight.data /= self.factor()[:, None]
        self.merged_adapters.clear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return y
        bias = 0 if self.base_layer.bias is None else self.base_layer.bias
        scaled = (y - bias) * self.factor() + bias
        return scaled * torch.sigmoid(y) if self.gated else scaled


class GainModel(BaseTuner):
    prefix = "gain_"
    tuner_layer_cls = GainLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (as its base class declares it)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        if isinstance(target, GainLayer):
            target.update_layer(adapter_name)
        else:
            layer = GainLayer(target, adapter_name, peft_config)
            self._replace_module(parent, target_name, layer, target)


@pytest.fixture
def newer_peft(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT as a release that adds the tuner registers it."""
    kinds: Any = peft.PeftType
    kind = str.__new__(kinds, "GAIN")
    kind._name_, kind._value_ = "GAIN", "GAIN"
    monkeypatch.setitem(kinds._member_map_, "GAIN", kind)
    monkeypatch.setitem(kinds._value2member_map_, "GAIN", kind)
    monkeypatch.setattr(kinds, "_member_names_", [*kinds._member_names_, "GAIN"])
    for name in ("CONFIG", "TUNER", "PREFIX"):
        table = f"PEFT_TYPE_TO_{name}_MAPPING"
        entry = {"CONFIG": GainConfig, "TUNER": GainModel, "PREFIX": "gain_"}[name]
        monkeypatch.setitem(getattr(peft.mapping, table), kind, entry)
    return kind


def cases(kind: Any) -> list[Case]:
    return [case for found, case in peft_cases.all_cases() if found == kind]


def test_is_tested_by_itself(newer_peft: Any) -> None:
    """Its case is among those that the tests run over, and passes every one of them."""
    assert "GAIN" not in CASES
    (case,) = cases(newer_peft)
    check: Any = test_peft_tuners
    check.test_weight_is_the_applied_one_and_training_is_undisturbed(newer_peft, case)
    check.test_base_below_the_adapter_is_taken_only_where_it_is_w_0(newer_peft, case)
    check.test_disabled_merged_and_several(newer_peft, case)


def test_fails_there_where_it_is_followed_wrongly(
    newer_peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests that it shows up in can fail."""
    monkeypatch.setattr(test_peft_tuners, "dense_weight", lambda module: module.base_layer.weight)
    check: Any = test_peft_tuners
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check.test_weight_is_the_applied_one_and_training_is_undisturbed(
            newer_peft, cases(newer_peft)[0]
        )


def test_has_its_row_in_the_table(newer_peft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_table, "all_cases", lambda: [(newer_peft, cases(newer_peft)[0])])
    table = support_table.rows().set_index("type")
    assert table.loc["GAIN", "read"] == "merge on a copy"


def test_merging_into_something_else_it_is_probed(
    newer_peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out by the first record's check, and right from the first record on."""

    def merge_twice(layer: Any, **_: Any) -> None:
        layer.base_layer.weight.data *= layer.factor()[:, None] ** 2
        layer.merged_adapters += layer.active_adapters

    monkeypatch.setattr(GainLayer, "merge", merge_twice)
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(Linears(), GainConfig(target_modules=["query"]))
    layer = model.base_model.model.layers[0].query
    recorder = dd.Recorder(model, ["query"])
    for step in range(3):
        with torch.no_grad():
            layer.gain_factor["default"].mul_(1 + 0.1 * torch.rand(24))
        recorder.step = step
        recorder.record()
    assert how_read(layer) == "probed"
    before, gain = layer.base_layer.weight.double(), layer.gain_factor["default"].double()
    change = dd.weight_change(before.detach(), (gain[:, None] * before).detach())
    row: Any = recorder.trajectory.query("step == 2").iloc[0]
    assert row["delta_magnitude"] == pytest.approx(change.delta_magnitude, rel=1e-6)
    assert len(recorder.trajectory) == 6


@pytest.mark.parametrize("right", [True, False])
def test_what_was_taken_for_granted_is_checked(
    newer_peft: Any, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    """A mask that leaves everything, and one that does not: found out, and read with waiting."""
    plain = GainLayer.factor

    def masked(layer: Any) -> torch.Tensor:
        factor = plain(layer)
        return factor * factor[factor > (0 if right else 1)].sum()

    monkeypatch.setattr(GainLayer, "factor", masked)
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(Linears(), GainConfig(target_modules=["query"]))
    layer = model.base_model.model.layers[0].query
    with torch.no_grad():
        layer.gain_factor["default"].uniform_(0.5, 1.5)
    assert how_read(layer) == ("merge on a copy" if right else "probed")
    expected = layer.factor().double()[:, None] * layer.base_layer.weight.double()
    torch.testing.assert_close(
        effective.dense_weight(layer), expected.detach(), rtol=1e-6, atol=1e-9
    )


def test_without_a_weight_it_is_refused(newer_peft: Any) -> None:
    torch.manual_seed(0)
    config = GainConfig(target_modules=["query"], gated=True)
    model: Any = peft.get_peft_model(Linears(), config)
    assert method_name(model.base_model.model.layers[0].query) == "GainLayer"
    with pytest.raises(NoDenseWeightError, match="GainLayer is not affine in its input"):
        dd.Recorder(model, ["query"]).record()
