"""Where adapters are put, how they start, and that merging leaves plain modules, equal outputs."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import dora_dynamics as dd
from dora_dynamics.adapters import DoRA
from dora_dynamics.errors import InputError
from dora_dynamics.sites import NoSiteMatchesError, find_sites
from tests.adapters.layers import APPLY, adapters, disturb, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
class TestApply:
    def test_starts_at_the_pretrained_weights_and_freezes_the_rest(
        self, method: str, tiny_transformer: Build
    ) -> None:
        plain, model = tiny_transformer(), tiny_transformer()
        sites = APPLY[method](model, ["query", "value"], rank=3, alpha=7)
        assert [site.name for site in sites] == list(adapters(model))
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        per_site = 2 if method == "LoRA" else 3
        assert len(trainable) == per_site * 4
        assert all(".parametrizations.weight.0." in name for name in trainable)
        for site in sites:
            start, pretrained = weight_of(model, site.name), weight_of(plain, site.name)
            torch.testing.assert_close(start, pretrained, rtol=2e-7, atol=0)
        for adapter in adapters(model).values():
            bound = np.sqrt(6 / (6 * adapter.lora_A.shape[1]))  # Kaiming-uniform with a = √5
            assert 0.5 * bound < adapter.lora_A.abs().max() <= bound
            assert adapter.scaling == pytest.approx(7 / 3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_weights_have_full_precision_adapters(
        self, method: str, dtype: torch.dtype, device: str
    ) -> None:
        model = nn.Sequential(nn.Linear(33, 20)).to(device, dtype)
        before = weight_of(model, "0").detach().clone()
        APPLY[method](model, ["0"], rank=2)
        assert {p.dtype for p in adapters(model)["0"].parameters()} == {torch.float32}
        assert weight_of(model, "0").dtype == dtype
        assert torch.equal(weight_of(model, "0"), before)
        model(torch.ones(3, 33, device=device, dtype=dtype)).float().sum().backward()
        disturb(model)
        adapter = adapters(model)["0"]
        expected = before.double() + adapter.scaling * (
            adapter.lora_B.double() @ adapter.lora_A.double()
        )
        if isinstance(adapter, DoRA):
            expected *= (adapter.magnitude.double() / expected.norm(dim=1))[:, None]
        torch.testing.assert_close(weight_of(model, "0"), expected.to(dtype), rtol=0.01, atol=1e-4)
        dd.merge(model)
        assert weight_of(model, "0").dtype == dtype

    def test_generator_decides_the_start_on_every_device(
        self, method: str, tiny_transformer: Build, device: str
    ) -> None:
        def start(seed: int, device: str = device) -> torch.Tensor:
            model = tiny_transformer().to(device)
            state = torch.get_rng_state()
            APPLY[method](model, ["query"], generator=torch.Generator().manual_seed(seed))
            assert torch.equal(torch.get_rng_state(), state)
            return adapters(model)["layers.0.query"].lora_A.detach()

        assert start(3).device.type == device
        assert torch.equal(start(3).cpu(), start(3, "cpu"))
        assert not torch.equal(start(3), start(4))

    def test_second_application_leaves_the_first_one_training(
        self, method: str, tiny_transformer: Build
    ) -> None:
        model = tiny_transformer()
        APPLY[method](model, ["query"], rank=2)
        adapters(model)["layers.1.query"].lora_A.requires_grad_(False)
        dd.apply_lora(model, ["value"], rank=5)
        frozen = {
            f"{name}.{key}"
            for name, adapter in adapters(model).items()
            for key, p in adapter.named_parameters()
            if not p.requires_grad
        }
        assert frozen == {"layers.1.query.lora_A"}

    def test_same_layer_twice_is_refused(self, method: str, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        APPLY[method](model, ["query"])
        with pytest.raises(ValueError, match=r"layers.0.query already has a parametrized weight"):
            APPLY[method](model, ["query", "value"])
        assert set(adapters(model)) == {"layers.0.query", "layers.1.query"}

    def test_rank_below_one_is_refused(self, method: str, tiny_transformer: Build) -> None:
        with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
            APPLY[method](tiny_transformer(), ["query"], rank=0)
        model = tiny_transformer()
        not_whole: tuple[Any, ...] = (2.5, "4", None)
        for rank in not_whole:
            with pytest.raises(InputError, match="rank must be a whole number"):
                APPLY[method](model, ["query"], rank=rank)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_nothing_matched_lists_what_there_is_and_changes_nothing(
        self, method: str, tiny_transformer: Build
    ) -> None:
        model = tiny_transformer()
        with pytest.raises(NoSiteMatchesError) as raised:
            APPLY[method](model, ["query", "q_lin"])
        message = str(raised.value)
        assert "'q_lin'" in message
        for role in ("query", "key", "value", "output", "head"):
            assert f"'{role}'" in message
        assert "layers.0.query" in message
        assert all(p.requires_grad for p in model.parameters())

    def test_targets_by_role_path_glob_and_pattern(
        self, method: str, tiny_transformer: Build
    ) -> None:
        def selected(*targets: str | re.Pattern[str]) -> set[str]:
            return {site.name for site in APPLY[method](tiny_transformer(), targets)}

        assert selected("output") == {"layers.0.out_proj", "layers.1.out_proj"}
        assert selected("layers.1.value") == {"layers.1.value"}
        assert selected("layers.0.*") == {
            f"layers.0.{name}" for name in ("query", "key", "value", "out_proj")
        }
        assert selected(re.compile(r"1\.(query|key)$")) == {"layers.1.query", "layers.1.key"}
        with pytest.raises(TypeError, match=r"must be a list of strings: \['query'\]"):
            APPLY[method](tiny_transformer(), "query")


def test_dora_leaves_a_zero_unit_zero(tiny_transformer: Build, train: Train) -> None:
    model = tiny_transformer()
    weight_of(model, "layers.0.query").data[2] = 0
    for detach_norm in (True, False):
        adapted = copy.deepcopy(model)
        dd.apply_dora(adapted, ["query"], rank=2, detach_norm=detach_norm)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        losses = train(adapted, torch.optim.AdamW(trained, lr=0.1), 4)
        assert np.isfinite(losses).all()
        assert all(torch.isfinite(p).all() for p in trained)
        assert torch.isfinite(weight_of(adapted, "layers.0.query")).all()


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
class TestMerge:
    def test_plain_modules_with_equal_outputs_after_training(
        self, method: str, tiny_transformer: Build, train: Train, device: str
    ) -> None:
        plain = tiny_transformer().to(device)
        model = copy.deepcopy(plain)
        sites = APPLY[method](model, ["query", "value"], rank=3)
        train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05), 5)
        model.eval()
        tokens = torch.arange(33, device=device).view(3, 11) % 11
        before = model(tokens)
        effective = {s.name: weight_of(model, s.name).clone() for s in sites}
        assert dd.merge(model) is model
        torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(before, plain.eval()(tokens), rtol=1e-3)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
        for module, original in zip(model.modules(), plain.modules(), strict=True):
            assert type(module) is type(original)
            assert not parametrize.is_parametrized(module)
        for name, weight in effective.items():
            merged = weight_of(model, name)
            assert isinstance(merged, nn.Parameter)
            assert torch.equal(merged, weight)
            assert not merged.requires_grad
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(plain(tokens), model(tokens), rtol=0, atol=0)

    def test_merged_and_adapted_models_can_be_copied(
        self, method: str, tiny_transformer: Build
    ) -> None:
        model = tiny_transformer().eval()
        APPLY[method](model, ["query"], rank=3)
        disturb(model)
        twin = copy.deepcopy(model)
        tokens = torch.arange(11).view(1, 11)
        torch.testing.assert_close(twin(tokens), model(tokens), rtol=0, atol=0)
        dd.merge(twin)
        assert len(adapters(model)) == 2
        assert find_sites(twin, ["query"]) == find_sites(model, ["query"])
        torch.testing.assert_close(twin(tokens), model(tokens), rtol=1e-5, atol=1e-6)
        again = copy.deepcopy(model)
        dd.merge(model)
        torch.testing.assert_close(model(tokens), again(tokens), rtol=1e-5, atol=1e-6)

    def test_nothing_to_merge(self, method: str, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        with pytest.raises(ValueError, match="carries no LoRA or DoRA"):
            dd.merge(model)
        APPLY[method](model, ["query"])
        dd.merge(model)
        with pytest.raises(ValueError, match="carries no LoRA or DoRA"):
            dd.merge(model)


def test_foreign_parametrizations_survive_a_merge(tiny_transformer: Build) -> None:
    model = tiny_transformer()
    nn.utils.parametrizations.weight_norm(model.get_submodule("head"))
    dd.apply_lora(model, ["query"])
    dd.merge(model)
    assert parametrize.is_parametrized(model.get_submodule("head"))


def test_a_parametrization_on_top_of_an_adapter_is_named_and_nothing_merged(
    tiny_transformer: Build,
) -> None:
    model = tiny_transformer()
    dd.apply_lora(model, ["query"])
    parametrize.register_parametrization(
        model.get_submodule("layers.1.query"), "weight", nn.Identity()
    )
    with pytest.raises(InputError, match="carries another parametrization beside its LoRA"):
        dd.merge(model)
    assert set(adapters(model)) == {"layers.0.query"}


def test_bert_attention_output_is_not_the_down_projection(tiny_bert: nn.Module) -> None:
    roles = {site.name: site.role for site in find_sites(tiny_bert, ["*"])}
    assert roles["encoder.layer.1.attention.output.dense"] == "output"
    assert roles["encoder.layer.1.output.dense"] == "down"
    assert roles["encoder.layer.1.attention.self.query"] == "query"


def test_layers_of_a_wrapped_model_keep_their_numbers(tiny_bert: nn.Module) -> None:
    wrapped = nn.Sequential(tiny_bert)
    assert [site.layer for site in find_sites(wrapped, ["query"])] == [0, 1]
