"""Targets, kinds of weights with their units, wrappers, experts, and what is refused."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.sites import (
    NoHeadsError,
    NoSiteMatchesError,
    Site,
    UnknownAxisError,
    describe_tensor,
    find_sites,
    register_linear,
    role_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]


def names(sites: list[Site]) -> list[str]:
    return [site.name for site in sites]


class TestTargets:
    def test_role_path_end_glob_and_pattern(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        both = ["layers.0.query", "layers.1.query"]
        for target in ("query", "*.query", re.compile(r"query$")):
            assert names(find_sites(model, [target], "matrix")) == both
        assert names(find_sites(model, ["0.query"], "matrix")) == both[:1]
        assert names(find_sites(model, ["layers.1.query"], "matrix")) == both[1:]

    def test_model_order_and_no_site_twice(self, tiny_transformer: Build) -> None:
        found = names(find_sites(tiny_transformer(), ["value", "*.query", "query"], "matrix"))
        assert found == ["layers.0.query", "layers.0.value", "layers.1.query", "layers.1.value"]

    def test_patterns_that_fit_linear_layers_select_nothing_else(
        self, tiny_bert: nn.Module
    ) -> None:
        for target in ("*", re.compile("encoder")):
            assert {s.kind for s in find_sites(tiny_bert, [target], "matrix")} == {"matrix"}

    def test_other_kinds_by_targets_that_fit_no_linear_layer(self, tiny_bert: nn.Module) -> None:
        kinds = {
            target: {s.kind for s in find_sites(tiny_bert, [target], "matrix")}
            for target in ("norm", "query_bias", "*.bias", "embedding", "LayerNorm")
        }
        assert kinds == {
            "norm": {"vector"},
            "query_bias": {"vector"},
            "*.bias": {"vector"},
            "embedding": {"embedding"},
            "LayerNorm": {"vector"},
        }
        (first, *_) = find_sites(tiny_bert, ["query_bias"], "matrix")
        assert first.name == "encoder.layer.0.attention.self.query.bias"
        assert first.layer == 0

    def test_module_granularity_is_linear_layers_only(self, tiny_bert: nn.Module) -> None:
        assert {s.kind for s in find_sites(tiny_bert, ["*"])} == {"matrix"}
        with pytest.raises(NoSiteMatchesError):
            find_sites(tiny_bert, ["norm"])

    def test_one_string_is_refused(self, tiny_transformer: Build) -> None:
        with pytest.raises(TypeError, match=r"\['query'\]"):
            find_sites(tiny_transformer(), "query")

    def test_message_lists_what_there_is(self, tiny_transformer: Build) -> None:
        with pytest.raises(NoSiteMatchesError, match=r"'kwery'.*'query' \(2, such as layers.0"):
            find_sites(tiny_transformer(), ["kwery"], "matrix")
        with pytest.raises(NoSiteMatchesError, match=r"layers\.0 is a \w+: .* as `base_layer`"):
            find_sites(tiny_transformer(), ["layers.0"])
        with pytest.raises(NoSiteMatchesError, match="targets is empty"):
            find_sites(tiny_transformer(), [])
        with pytest.raises(NoSiteMatchesError, match="no linear layers"):
            find_sites(nn.Sequential(nn.ReLU()), ["query"])

    def test_unknown_granularity(self, tiny_transformer: Build) -> None:
        bad: Any = "neuron"
        with pytest.raises(ValueError, match="granularity"):
            find_sites(tiny_transformer(), ["query"], bad)
        with pytest.raises(ValueError, match="granularity"):
            dd.Recorder(tiny_transformer(), ["query"], granularity=bad)

    def test_unknown_names_have_their_path_for_a_role(self) -> None:
        """Two layers that share a last name are not taken for one kind of weight."""
        model = nn.ModuleDict({"frobnicate": nn.Linear(3, 2)})
        (site,) = find_sites(model, ["frobnicate"], "matrix")
        assert (site.role, site.layer, site.stack) == ("frobnicate", None, "")
        parts = [nn.ModuleDict({"mixing": nn.Linear(3, 2), "norm": nn.LayerNorm(2)}) for _ in "ab"]
        model = nn.ModuleDict({"layers": nn.ModuleList(parts), "mixing": nn.Linear(3, 2)})
        found = find_sites(model, ["mixing", "norm"], "matrix")
        assert [(site.role, site.layer) for site in found] == [
            ("layers.*.mixing", 0), ("norm", 0), ("layers.*.mixing", 1), ("norm", 1),
            ("mixing", None),
        ]  # fmt: skip
        assert role_of("blocks.3.mixer.in_proj") == "in_proj"

    def test_layer_is_the_number_after_a_layer_container(self) -> None:
        def queries(count: int) -> nn.ModuleList:
            return nn.ModuleList(nn.ModuleDict({"query": nn.Linear(2, 2)}) for _ in range(count))

        model = nn.ModuleList([nn.Identity(), nn.ModuleDict({"layers": queries(3)})])
        found = find_sites(model, ["query"], "matrix")
        assert found[0].name == "1.layers.0.query"
        assert [site.layer for site in found] == [0, 1, 2]
        assert [site.layer for site in find_sites(queries(2), ["query"])] == [0, 1]


class TestUnits:
    """What one unit is, for each kind of weight, against the definition on plain tensors."""

    @pytest.mark.parametrize(
        ("module", "target", "output", "input_"),
        [
            (nn.Embedding(7, 5), "embedding", 7, 5),
            (nn.Conv2d(3, 4, 2), "conv", 4, 12),
            (nn.Conv1d(3, 4, 2), "conv", 4, 6),
            (nn.LayerNorm(6), "norm", 1, 6),
            (nn.GroupNorm(2, 6), "norm", 1, 6),
            (nn.Linear(6, 3), "linear.bias", 1, 3),
            (nn.Linear(6, 3), "linear", 3, 6),
        ],
    )
    def test_units(self, module: nn.Module, target: str, output: int, input_: int) -> None:
        name = target.partition(".")[0]
        model = nn.ModuleDict({name: module})
        parameter = module.bias if target.endswith("bias") else module.weight
        assert isinstance(parameter, nn.Parameter)
        with torch.no_grad():
            parameter.normal_()
        before = parameter.detach().clone()
        recorders = [dd.Recorder(model, [target], axis=axis) for axis in ("output", "input")]
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
        flat, now = (
            t.reshape(1, -1) if t.ndim == 1 else t.flatten(1) for t in (before, parameter.detach())
        )
        for recorder, units in zip(recorders, (output, input_), strict=True):
            recorder.record()
            (row,) = recorder.trajectory.to_dict(orient="records")
            expected = dd.weight_change(flat, now, recorder.axis)
            assert row["units"] == units == len(expected.units)
            assert row["delta_magnitude"] == pytest.approx(expected.delta_magnitude, rel=1e-6)
            assert row["delta_direction"] == pytest.approx(expected.delta_direction, rel=1e-6)

    def test_embedding_by_input_is_the_unit_of_pefts_dora(self) -> None:
        peft = pytest.importorskip("peft")
        embedding = nn.Embedding(7, 5)
        model = nn.Sequential(embedding)
        weight = embedding.weight.detach().clone()
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["0"], use_dora=True, r=2)
        )
        magnitude = adapted.base_model.model[0].lora_magnitude_vector["default"].weight.detach()
        ours = dd.magnitude(weight, axis="input")
        torch.testing.assert_close(
            magnitude.flatten().double(), torch.as_tensor(ours), rtol=1e-6, atol=0
        )


class TestExperts:
    @pytest.fixture
    def mixtral(self) -> Any:
        transformers = pytest.importorskip("transformers")
        config = transformers.MixtralConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=8, vocab_size=16, num_local_experts=3, num_experts_per_tok=1,
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(config)

    def test_one_row_for_each_expert(self, mixtral: Any) -> None:
        recorder = dd.Recorder(mixtral, ["expert_down", "expert_gate"])
        tensor = mixtral.model.layers[0].mlp.experts.down_proj
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor[1] += 0.1
        recorder.record()
        table = recorder.trajectory
        prefix = "model.layers.0.mlp.experts."
        assert table["site"].tolist() == [
            *(f"{prefix}gate_up_proj[{i}][gate]" for i in range(3)),
            *(f"{prefix}down_proj[{i}]" for i in range(3)),
        ]
        rows = table.set_index("site")["delta_magnitude"]
        expected = dd.weight_change(before[1], tensor[1].detach()).delta_magnitude
        assert rows[f"{prefix}down_proj[1]"] == pytest.approx(expected, rel=1e-6)
        assert (rows.drop(f"{prefix}down_proj[1]") == 0).all()

    def test_baseline_is_copied_once_for_all_experts(self, mixtral: Any) -> None:
        recorder = dd.Recorder(mixtral, ["expert_down"])
        assert len(recorder.sites) == 3
        assert list(recorder._baseline.weights) == ["model.layers.0.mlp.experts.down_proj"]

    def test_gate_comes_before_up(self, mixtral: Any) -> None:
        """Silencing the rows of `gate` silences the expert, as does silencing those of `up`."""
        experts = mixtral.model.layers[0].mlp.experts
        x, index, weight = torch.randn(1, 8), torch.tensor([[2]]), torch.ones(1, 1)
        full = experts(x, index, weight)
        (gate,) = (s for s in find_sites(mixtral, ["expert_gate"], "matrix") if s.expert == 2)
        w, v = experts.gate_up_proj[2].detach().split(8)
        expected = (nn.functional.silu(x @ w.T) * (x @ v.T)) @ experts.down_proj[2].detach().T
        torch.testing.assert_close(full.detach(), expected)
        assert gate.oriented(experts.gate_up_proj.detach()).equal(w)


class TestFiles:
    def test_fused_weight_of_a_file(self) -> None:
        config = {"model_type": "gpt2", "n_head": 2, "n_embd": 8}
        sites = describe_tensor("h.3.attn.c_attn.weight", (8, 24), config, "head")
        assert [(s.role, s.head, s.rows) for s in sites[:3]] == [
            ("query", 0, ((0, 4),)),
            ("query", 1, ((4, 8),)),
            ("key", 0, ((8, 12),)),
        ]
        assert {s.layer for s in sites} == {3}
        assert all(s.stored_transposed for s in sites)

    def test_axis_that_the_name_does_not_tell(self) -> None:
        with pytest.raises(UnknownAxisError, match=r"config\.json"):
            describe_tensor("h.0.mlp.c_fc.weight", (8, 32))
        (llama,) = describe_tensor("h.0.mlp.c_fc.weight", (8, 32), {"model_type": "starcoder2"})
        assert not llama.stored_transposed
        with pytest.raises(UnknownAxisError, match="experts"):
            describe_tensor("layers.0.mlp.experts.down_proj", (3, 8, 8), {"model_type": "new"})

    def test_kinds(self) -> None:
        def kind(name: str, *shape: int) -> str:
            return "/".join(f"{s.kind} {s.role}" for s in describe_tensor(name, shape, {}))

        assert kind("model.embed_tokens.weight", 32, 8) == "embedding embedding"
        assert kind("model.norm.weight", 8) == "vector norm"
        assert kind("model.layers.0.self_attn.q_proj.bias", 8) == "vector query_bias"
        assert kind("vision.patch_embedding.weight", 8, 3, 4, 4) == "filters vision.patch_embedding"
        assert kind("layers.0.block_sparse_moe.experts.1.w1.weight", 8, 8) == "matrix expert_gate"
        assert kind("rotary.inv_freq", 8) == ""
        assert kind("logit_scale") == ""

    def test_site_survives_json(self) -> None:
        import json

        config = {"model_type": "bloom", "n_head": 2, "hidden_size": 8}
        for site in describe_tensor(
            "h.0.self_attention.query_key_value.weight", (24, 8), config, "head"
        ):
            assert Site(**json.loads(json.dumps(asdict(site)))) == site


class TestWrappers:
    @pytest.fixture
    def plain(self, tiny_transformer: Build) -> list[str]:
        return names(find_sites(tiny_transformer(), ["query", "output"], "matrix"))

    def test_compiled(self, tiny_transformer: Build, plain: list[str]) -> None:
        compiled = torch.compile(tiny_transformer(), backend="eager")
        assert isinstance(compiled, nn.Module)
        sites = find_sites(compiled, ["query", "output"], "matrix")
        assert names(sites) == plain
        assert {s.module for s in sites} == {f"_orig_mod.{name}" for name in plain}
        assert isinstance(compiled.get_submodule(sites[0].module), nn.Linear)

    def test_data_parallel(self, tiny_transformer: Build, plain: list[str]) -> None:
        assert (
            names(find_sites(nn.DataParallel(tiny_transformer()), ["query", "output"], "matrix"))
            == plain
        )

    def test_peft(self, tiny_transformer: Build, plain: list[str]) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["query", "out_proj"], r=2)
        model = peft.get_peft_model(tiny_transformer(), config)
        sites = find_sites(model, ["query", "output"], "matrix")
        assert names(sites) == plain
        assert all(hasattr(model.get_submodule(s.module), "base_layer") for s in sites)
        everything = find_sites(model, ["*"], "matrix")
        assert not [s for s in everything if "lora" in s.name or "base_layer" in s.module]
        part = nn.ModuleDict({"backbone": model})
        sites = find_sites(part, ["query", "output"], "matrix")
        assert names(sites) == [f"backbone.{name}" for name in plain]

    def test_modules_to_save(self, tiny_transformer: Build) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["query"], r=2, modules_to_save=["head"])
        model = peft.get_peft_model(tiny_transformer(), config)
        assert names(find_sites(model, ["head"], "matrix")) == ["head"]
        assert len(find_sites(model, ["embedding"], "matrix")) == 1

    def test_adapters_of_this_package(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        dd.apply_dora(model, ["query"], rank=2)
        assert names(find_sites(model, ["*"], "matrix")) == names(
            find_sites(tiny_transformer(), ["*"], "matrix")
        )

    def test_registered_layer_is_one_site(self) -> None:
        @register_linear
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 3)
                self.scale = nn.Parameter(torch.ones(3))
                self.in_features, self.out_features = 4, 3

            @property
            def weight(self) -> torch.Tensor:
                return self.scale.unsqueeze(1) * self.inner.weight

        model = nn.ModuleDict({"q_proj": Scaled()})
        (site,) = find_sites(model, ["query"], "matrix")
        assert (site.name, site.role) == ("q_proj", "query")
        assert len(find_sites(model, ["*"], "matrix")) == 1


class TestHeads:
    def test_projection_without_known_heads_is_refused(self, tiny_transformer: Build) -> None:
        with pytest.raises(NoHeadsError, match=r"heads of layers\.0\.query are not known"):
            find_sites(tiny_transformer(), ["query"], "head")

    def test_what_has_no_heads_stays_whole_beside_what_has(self, tiny_bert: nn.Module) -> None:
        sites = find_sites(tiny_bert, ["query", "up"], "head")
        assert [s.head for s in sites] == [0, 1, 2, None] * 2

    def test_heads_that_do_not_fit_the_shape(self) -> None:
        config = {"model_type": "strange", "num_attention_heads": 4, "hidden_size": 16}
        (site,) = describe_tensor("layers.0.q_proj.weight", (24, 16), config, "head")
        assert site.head is None

    def test_run_directory_of_heads(self, tiny_bert: nn.Module, tmp_path: Any) -> None:
        recorder = dd.Recorder(
            tiny_bert, ["query"], granularity="head", run_dir=tmp_path / "run",
            keep=["weights", "units"],
        )  # fmt: skip
        recorder.record()
        with torch.no_grad():
            for parameter in tiny_bert.parameters():
                parameter.add_(0.01)
        recorder.step = 3
        recorder.record()
        table = dd.load_runs(tmp_path / "run")
        assert table.groupby(["step", "site"])["head"].apply(list).tolist() == [[0, 1, 2]] * 4
        again = dd.remeasure(tmp_path / "run")
        assert again.equals(table)
        units = dd.load_units(tmp_path / "run", 3)
        assert len(units) == 6
        assert {len(change) for change in units.values()} == {4}
