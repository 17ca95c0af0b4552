"""PEFT's less usual layers: parameters of experts, attention modules, copies, tokens, mixtures."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import peft
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import dora_dynamics as dd
from dora_dynamics.effective import (
    LowRank,
    NoDenseWeightError,
    dense_weight,
    effective_weight,
    magnitude_parameter,
    method_of,
    stored_parameter,
)
from dora_dynamics.recording.baseline_source import BaselineError
from tests.effective.training import losses

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


class Attention(nn.Module):
    """Torch's own attention, whose query, key and value share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.up(self.attn(x, x, x)[0]).tanh())
        return y


class Tagger(nn.Module):
    """An embedding, a linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.query = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.norm(self.query(self.embed_tokens(x))))
        return y


def experts() -> Any:
    config = MixtralConfig(
        vocab_size=11, hidden_size=16, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        num_experts_per_tok=2, max_position_embeddings=16,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def run(model: Any, recorder: dd.Recorder | None, batch: torch.Tensor) -> list[float]:
    """A few steps on one batch, recorded or not."""
    return losses(model, recorder, lambda: batch, lr=1e-2)


class TestExperts:
    """`target_parameters`: one adapter for all experts that are stored in one parameter."""

    config: ClassVar[dict[str, Any]] = {
        "r": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }

    def test_each_parameter_by_merging_a_copy(self) -> None:
        pytest.importorskip("transformers", "5", reason="older ones name experts otherwise")
        torch.manual_seed(0)
        model = experts()
        before = copy.deepcopy(model)
        plain = copy.deepcopy(model)
        torch.manual_seed(1)
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**self.config))
        torch.manual_seed(1)
        unwatched: Any = peft.get_peft_model(plain, peft.LoraConfig(**self.config))
        targets = ["expert_down", "expert_gate", "expert_up", "query"]
        recorder = dd.Recorder(adapted, targets, every=1)
        batch = torch.arange(8).reshape(2, 4)
        assert run(adapted, recorder, batch) == run(unwatched, None, batch)
        for ours, theirs in zip(adapted.parameters(), unwatched.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        merged = copy.deepcopy(adapted).double().merge_and_unload()
        rows: Any = recorder.trajectory.query("step == 3").set_index("site")
        assert len(rows) == 3 * 3 + 1
        layer = "model.layers.0.mlp.experts"
        for parameter in ("gate_up_proj", "down_proj"):
            now = getattr(merged.get_submodule(layer), parameter)
            wrapper = adapted.base_model.model.get_submodule(layer)
            torch.testing.assert_close(dense_weight(wrapper, parameter), now, rtol=0, atol=1e-12)
            was = getattr(before.get_submodule(layer), parameter).double()
            assert not torch.equal(was, now)
            if parameter == "down_proj":
                for expert in range(3):
                    change = dd.weight_change(was[expert], now[expert])
                    row = rows.loc[f"{layer}.down_proj[{expert}]"]
                    assert row["update_norm"] == pytest.approx(change.update_norm, rel=1e-6)


class TestMultiheadAttention:
    """PEFT merges and unmerges torch's attention in every forward pass."""

    def adapted(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        model = Attention()
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn"]))

    def test_in_proj(self) -> None:
        model, other = self.adapted(), self.adapted()
        before = model.base_model.model.attn.base_layer.in_proj_weight.detach().clone()
        recorder = dd.Recorder(model, ["query", "key", "value"], every=1)
        batch = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
        assert run(model, recorder, batch) == run(other, None, batch)
        merged = copy.deepcopy(model).double().merge_and_unload().attn.in_proj_weight
        rows: Any = recorder.trajectory.query("step == 3").set_index("role")
        for i, role in enumerate(("query", "key", "value")):
            part = slice(8 * i, 8 * (i + 1))
            change = dd.weight_change(before[part].double(), merged[part])
            assert rows.loc[role, "update_norm"] == pytest.approx(change.update_norm, rel=1e-4)

    @pytest.mark.parametrize("made", ["after the adapter", "before it"])
    def test_out_proj(self, made: str) -> None:
        """What the whole layer puts out is what plain attention does with the weights read."""
        torch.manual_seed(0)
        plain = Attention()
        targets = ["query", "key", "value", "output"]
        config = peft.LoraConfig(r=2, target_modules=["attn"])
        before = plain.attn.out_proj.weight.detach().double()
        if made == "before it":
            recorder = dd.Recorder(plain, targets, every=1)
            model: Any = peft.get_peft_model(plain, config)
        else:
            model = peft.get_peft_model(plain, config)
            recorder = dd.Recorder(model, targets, every=1)
        run(model, recorder, torch.randn(2, 4, 8))
        layer = model.base_model.model.attn.eval()
        weights = {name: where.dense() for name, where in recorder._followed.items()}
        assert set(weights) == {"attn.in_proj_weight", "attn.out_proj"}
        reference: Any = nn.MultiheadAttention(8, 2, batch_first=True).double()
        with torch.no_grad():
            reference.in_proj_weight.copy_(weights["attn.in_proj_weight"])
            reference.out_proj.weight.copy_(weights["attn.out_proj"])
            reference.in_proj_bias.copy_(layer.in_proj_bias)
            reference.out_proj.bias.copy_(layer.out_proj.bias)
        x = torch.randn(2, 4, 8)
        expected = reference(x.double(), x.double(), x.double())[0].detach()
        torch.testing.assert_close(layer(x, x, x)[0].double(), expected, rtol=0, atol=1e-6)
        rows: Any = recorder.trajectory.query("step == 3").set_index("site")
        change = dd.weight_change(before, weights["attn.out_proj"])
        assert rows.loc["attn.out_proj", "update_norm"] == pytest.approx(change.update_norm)
        assert change.update_norm > 0
        assert rows["total_decay"].tolist() == [0.0] * 4  # what is frozen does not decay

    def test_out_proj_of_a_saved_copy(self) -> None:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["attn"])
        model: Any = peft.get_peft_model(Attention(), config)
        recorder = dd.Recorder(model, ["query", "output"], every=1)
        run(model, recorder, torch.randn(2, 4, 8))
        wrapper = model.base_model.model.attn
        before = wrapper.original_module.out_proj.weight.detach()
        change = dd.weight_change(
            before, wrapper.modules_to_save["default"].out_proj.weight.detach()
        )
        rows: Any = recorder.trajectory.query("step == 3").set_index("site")
        assert rows.loc["attn.out_proj", "update_norm"] == change.update_norm > 0
        assert recorder.method == "FT"

    def test_an_adapter_that_is_never_called_is_refused(self) -> None:
        model = peft.get_peft_model(Attention(), peft.LoraConfig(r=2, target_modules=["out_proj"]))
        with pytest.raises(NoDenseWeightError, match="attention never calls its output projection"):
            dd.Recorder(model, ["output"])


class TestBiases:
    """A bias below an adapter can be followed, whether it trains there or gets something added."""

    def test_of_the_base_layer(self) -> None:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["query"], bias="all")
        model: Any = peft.get_peft_model(Tagger(), config)
        recorder = dd.Recorder(model, ["query_bias"], every=1, method="LoRA")
        bias = model.base_model.model.query.base_layer.bias
        before = bias.detach().clone()
        run(model, recorder, torch.arange(8).reshape(2, 4))
        row: Any = recorder.trajectory.query("step == 3").iloc[0]
        assert row["site"] == "query.bias"
        assert row["update_norm"] == pytest.approx((bias - before).norm().item(), rel=1e-5)
        assert row["update_norm"] > 0

    @pytest.mark.skipif(not hasattr(peft, "BeftConfig"), reason="this PEFT has no BEFT")
    def test_added_by_the_adapter(self) -> None:
        torch.manual_seed(0)
        model: Any = peft.get_peft_model(Tagger(), peft.BeftConfig(target_modules=["query"]))
        recorder = dd.Recorder(model, ["query_bias"], every=1)
        run(model, recorder, torch.arange(8).reshape(2, 4))
        added = model.base_model.model.query.beft_bias["default"].detach()
        row: Any = recorder.trajectory.query("step == 3").iloc[0]
        assert row["update_norm"] == pytest.approx(added.norm().item(), rel=1e-5)
        assert row["update_norm"] > 0


class TestCopies:
    """`modules_to_save` and trainable tokens: what trains is a copy beside the original."""

    def test_modules_to_save(self) -> None:
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, target_modules=["query"], modules_to_save=["head", "norm", "embed_tokens"]
        )
        model: Any = peft.get_peft_model(Tagger(), config)
        recorder = dd.Recorder(
            model, ["head", "norm", "embed_tokens"], every=1, method="LoRA with a trained head"
        )
        before = model.base_model.model.head.original_module.weight.detach().clone()
        run(model, recorder, torch.arange(8).reshape(2, 4))
        wrapper = model.base_model.model.head
        trained = wrapper.modules_to_save["default"].weight.detach()
        assert torch.equal(dense_weight(wrapper), trained)
        assert magnitude_parameter(wrapper) is wrapper.modules_to_save["default"].weight
        assert method_of(wrapper) == "FT"
        rows: Any = recorder.trajectory.query("step == 3").set_index("site")
        change = dd.weight_change(before, trained)
        assert rows.loc["head", "delta_direction"] == change.delta_direction > 0
        assert rows.loc["norm", "update_norm"] > 0
        assert rows.loc["embed_tokens", "update_norm"] > 0
        with model.disable_adapter():
            assert torch.equal(dense_weight(wrapper), before)

    def test_trainable_tokens_beside_lora(self) -> None:
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, target_modules=["query"], trainable_token_indices={"embed_tokens": [1, 3]}
        )
        model: Any = peft.get_peft_model(Tagger(), config)
        recorder = dd.Recorder(model, ["embed_tokens"], every=1)
        run(model, recorder, torch.arange(8).reshape(2, 4))
        wrapper = model.base_model.model.embed_tokens
        moved = (dense_weight(wrapper) != wrapper.original_module.weight).any(1)
        assert moved.nonzero().flatten().tolist() == [1, 3]
        assert recorder.method == "trainable tokens"
        assert recorder.trajectory.query("step == 3")["update_norm"].item() > 0


class TestAdaLoRA:
    """Its rank goes down after the optimizer's step."""

    @pytest.mark.parametrize("counted", ["by the optimizer", "by the loop"])
    def test_rows_before_and_after_the_pruning(self, counted: str) -> None:
        torch.manual_seed(0)
        config = peft.AdaLoraConfig(
            init_r=6, target_r=1, total_step=12, tinit=1, tfinal=2, target_modules=["query"]
        )
        model: Any = peft.get_peft_model(nn.ModuleDict({"query": nn.Linear(16, 24)}), config)
        layer = model.base_model.model["query"]
        base = layer.base_layer.weight.detach().double()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        recorder = dd.Recorder(model, ["query"], every=1)
        recorder.start(optimizer, count_steps=counted == "by the optimizer")
        stepped, pruned = [0.0], [0.0]
        for step in range(5):
            optimizer.zero_grad()
            (layer(torch.randn(5, 16)) - 1).square().mean().backward()
            optimizer.step()
            stepped.append((merged_alone(layer) - base).norm().item())
            model.base_model.update_and_allocate(step)
            pruned.append((merged_alone(layer) - base).norm().item())
            if counted == "by the loop":
                recorder.advance_to(step + 1)
        recorder.finish()
        expected = stepped if counted == "by the optimizer" else pruned
        assert recorder.trajectory["update_norm"].tolist() == pytest.approx(expected, abs=1e-9)
        assert stepped[-1] > 1.1 * pruned[-1]


def merged_alone(layer: Any) -> torch.Tensor:
    """W' of a layer by PEFT's own merge of a copy."""
    other = copy.deepcopy(layer).double().eval()
    other.merge()
    weight: torch.Tensor = other.base_layer.weight.detach()
    return weight


class TestSeveralMethods:
    """Different tuners on one model, and one around another."""

    def test_mixed_model(self) -> None:
        torch.manual_seed(0)
        model: Any = peft.PeftMixedModel(
            Tagger(), peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False), "one"
        )
        model.add_adapter("two", peft.LoHaConfig(r=2, target_modules=["query"], init_weights=False))
        model.set_adapter(["one", "two"])
        layer = model.base_model.model.query
        x = torch.randn(5, 8)
        model.eval()
        with torch.no_grad():
            expected = layer(x) - layer(torch.zeros_like(x))
        torch.testing.assert_close(x @ dense_weight(layer).float().T, expected)


class TestLoRA:
    """What the direct formula gives."""

    def model(self, **options: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **options)
        return peft.get_peft_model(Tagger(), config)

    def test_two_adapters_by_their_factors(self) -> None:
        model = self.model(lora_alpha=3)
        other = peft.LoraConfig(
            r=3, lora_alpha=5, use_rslora=True, target_modules=["query"], init_lora_weights=False
        )
        model.add_adapter("other", other)
        model.base_model.set_adapter(["default", "other"])
        layer = model.base_model.model.query
        weight = effective_weight(layer)
        assert isinstance(weight, LowRank)
        assert weight.A.shape == (5, 8)
        merged = copy.deepcopy(model).double().merge_and_unload()
        torch.testing.assert_close(dense_weight(layer), merged.query.weight.detach())
        model.base_model.set_adapter("other")
        assert isinstance(alone := effective_weight(layer), LowRank)
        assert alone.A.shape == (3, 8)

    def test_decay_is_of_the_magnitude_vector(self) -> None:
        layer = self.model(use_dora=True).base_model.model.query
        assert magnitude_parameter(layer) is layer.lora_magnitude_vector["default"].weight
        layer = self.model().base_model.model.query
        assert magnitude_parameter(layer) is layer.base_layer.weight

    def test_frozen_base_is_not_copied(self) -> None:
        model = self.model()
        recorder = dd.Recorder(model, ["query"])
        layer = model.base_model.model.query
        assert stored_parameter(layer) is layer.base_layer.weight
        assert recorder._baseline.weights["query"] is layer.base_layer.weight

    def test_recorder_made_before_the_adapter(self) -> None:
        torch.manual_seed(0)
        plain = Tagger()
        recorder = dd.Recorder(plain, ["query"], every=1)
        model: Any = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["query"]))
        run(model, recorder, torch.arange(8).reshape(2, 4))
        assert recorder.method == "LoRA"
        assert recorder.trajectory.query("step == 3")["update_norm"].item() > 0
        assert recorder._baseline.weights["query"] is model.base_model.model.query.base_layer.weight

    def test_merging_while_recorded_is_refused(self) -> None:
        model = self.model()
        recorder = dd.Recorder(model, ["query"])
        model.merge_adapter()
        with pytest.raises(BaselineError, match="has been merged into its base weight"):
            recorder.record()

    def test_merging_while_recorded_from_a_captured_baseline(self) -> None:
        torch.manual_seed(0)
        plain = Tagger()
        baseline = dd.capture_baseline(plain, ["query"])
        config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
        model: Any = peft.get_peft_model(plain, config)
        unmerged = dd.Recorder(model, ["query"], baseline=baseline)
        unmerged.record()
        model.merge_adapter()
        merged = dd.Recorder(model, ["query"], baseline=baseline)
        merged.record()
        for column in ("delta_direction", "delta_magnitude"):
            ours, theirs = (r.trajectory[column].item() for r in (merged, unmerged))
            assert ours == pytest.approx(theirs, rel=1e-5)

    def test_bfloat16_base_with_float32_factors(self) -> None:
        torch.manual_seed(0)
        plain = Tagger().bfloat16()
        model: Any = peft.get_peft_model(
            plain, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights="olora")
        )
        layer = model.base_model.model.query
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.base_layer.weight.double() + 4 * B.double() @ A.double()
        torch.testing.assert_close(dense_weight(layer), expected, rtol=0, atol=1e-12)

    @pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
    def test_grouped_convolution_is_refused_or_right(self) -> None:
        torch.manual_seed(0)

        class Grouped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(4, 8, 3, groups=2, padding=1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y: torch.Tensor = self.conv(x)
                return y

        config = peft.LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False)
        model: Any = peft.get_peft_model(Grouped(), config).eval()
        layer = model.base_model.model.conv
        x = torch.randn(2, 4, 5, 5)
        try:
            weight = dense_weight(layer).float()
        except NoDenseWeightError:
            return
        again = nn.functional.conv2d(x, weight, layer.base_layer.bias, padding=1, groups=2)
        torch.testing.assert_close(again, layer(x), rtol=1e-5, atol=1e-5)
