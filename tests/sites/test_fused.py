"""Rows of fused weights against what the models' own attention makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.sites import NoSiteMatchesError, Site, describe_tensor, find_sites

if TYPE_CHECKING:
    from collections.abc import Callable

transformers = pytest.importorskip("transformers")

HEADS, KV, WIDTH = 4, 2, 16
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASIC: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": 24,
    "vocab_size": 32,
}
FALCON = {k: v for k, v in BASIC.items() if k != "intermediate_size"} | {"bias": True}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": 1, "n_head": HEADS, "vocab_size": 32, **IDS},
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BASIC),
    "GPT-NeoX-Japanese": (
        "GPTNeoXJapaneseForCausalLM",
        "GPTNeoXJapaneseConfig",
        {k: v for k, v in BASIC.items() if k != "intermediate_size"} | {"bos_token_id": 1,
        "eos_token_id": 2, "intermediate_multiple_size": 1},
    ),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", BASIC | IDS | {"num_key_value_heads": KV}),
    "Persimmon": ("PersimmonForCausalLM", "PersimmonConfig", BASIC | IDS | {"qk_layernorm": False}),
    "ModernBERT": (
        "ModernBertModel",
        "ModernBertConfig",
        BASIC | IDS | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "MPT": (
        "MptForCausalLM", "MptConfig",
        {"d_model": WIDTH, "n_heads": HEADS, "n_layers": 1, "vocab_size": 32,
         "max_seq_len": 8, "expansion_ratio": 1},
    ),
    "GPTBigCode (multi-query)": (
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"n_embd": WIDTH, "n_layer": 1, "n_head": HEADS, "vocab_size": 32, **IDS},
    ),
    "GPTBigCode": (
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        {"n_embd": WIDTH, "n_layer": 1, "n_head": HEADS, "vocab_size": 32, "multi_query": False}
        | IDS,
    ),
    "BLOOM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": WIDTH, "n_layer": 1, "n_head": HEADS, "vocab_size": 32},
    ),
    "Falcon (new)": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": KV},
    ),
    "Falcon (multi-query)": ("FalconForCausalLM", "FalconConfig", FALCON | {"multi_query": True}),
    "Falcon (old)": ("FalconForCausalLM", "FalconConfig", FALCON | {"multi_query": False}),
}  # fmt: skip

Parts = dict[str, torch.Tensor]


class _Seen(Exception):  # noqa: N818
    """Carries what attention was given out of a forward pass."""

    def __init__(self, *parts: torch.Tensor) -> None:
        self.parts = parts


def attention_inputs(model: Any, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Query, key and value as the model's own code splits them: (batch, heads, tokens, size)."""
    name = type(model).__name__

    def spy(_module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        raise _Seen(query, key, value)

    with monkeypatch.context() as patch:
        if name in ("BloomForCausalLM", "FalconForCausalLM"):
            method = "_reshape" if name == "BloomForCausalLM" else "_split_heads"
            for module in model.modules():
                if hasattr(module, method):
                    original = getattr(type(module), method)

                    def seen(qkv: Any, module: Any = module, original: Any = original) -> Any:
                        raise _Seen(*original(module, qkv))

                    patch.setattr(module, method, seen)
        elif name == "GPTNeoXJapaneseForCausalLM":
            for module in model.modules():
                if hasattr(module, "_attn"):
                    patch.setattr(module, "_attn", lambda q, k, v, *_: spy(None, q, k, v))
        elif name == "MptForCausalLM":
            from transformers.models.mpt import modeling_mpt

            split = torch.Tensor.chunk

            def chunk(tensor: Any, *args: Any, **kwargs: Any) -> Any:
                parts = split(tensor, *args, **kwargs)
                heads = [p.view(*p.shape[:-1], HEADS, -1).transpose(1, 2) for p in parts]
                raise _Seen(*heads)

            assert modeling_mpt is not None
            patch.setattr(torch.Tensor, "chunk", chunk)
        else:
            functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
            patch.setattr(functions, "get_interface", lambda *_: spy, raising=False)
        with pytest.raises(_Seen) as caught, torch.no_grad():
            model(input_ids=torch.arange(6).unsqueeze(0))
    parts = caught.value.parts
    if name == "FalconForCausalLM":
        parts = tuple(part.transpose(1, 2) for part in parts)
    return dict(zip(("query", "key", "value"), parts, strict=True))


def build(name: str) -> nn.Module:
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model: nn.Module = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def silence(model: nn.Module, site: Site) -> Callable[[], None]:
    """Set the site's rows of weight and bias to zero; returns how to put them back."""
    module = model.get_submodule(site.module)
    kept = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    with torch.no_grad():
        for start, stop in site.rows or ():
            site.matrix(module.get_parameter("weight"))[start:stop] = 0.0
            if getattr(module, "bias", None) is not None:
                module.get_parameter("bias")[start:stop] = 0.0

    def restore() -> None:
        with torch.no_grad():
            for name, value in kept.items():
                module.get_parameter(name).copy_(value)

    return restore


@pytest.mark.filterwarnings("ignore:.*attention_mask.*")
def test_heads_are_what_attention_is_given(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silencing one head's rows silences that head of query (or key, or value), and no other."""
    before = attention_inputs(model, monkeypatch)
    sites = find_sites(model, ["query", "key", "value"], "head")
    assert {site.role for site in sites} == {"query", "key", "value"}
    for site in sites:
        restore = silence(model, site)
        after = attention_inputs(model, monkeypatch)
        restore()
        for part, tensor in before.items():
            heads = tensor.shape[1]
            own = sum(s.role == part for s in sites)
            for head in range(heads):
                # grouped keys and values that a model repeats, once for each of its queries
                number = head * own // heads
                silenced = part == site.role and number == site.head
                now = after[part][:, head]
                if silenced:
                    assert (now == 0).all(), (site, part, head)
                    assert (tensor[:, head] != 0).any()
                else:
                    assert torch.equal(now, tensor[:, head]), (site, part, head)


def test_part_is_the_union_of_its_heads(model: nn.Module) -> None:
    whole = {s.role: s for s in find_sites(model, ["query", "key", "value"], "matrix")}
    for role, site in whole.items():
        rows = {r for start, stop in site.rows or () for r in range(start, stop)}
        heads = find_sites(model, [role], "head")
        assert rows == {r for h in heads for a, b in h.rows or () for r in range(a, b)}
        assert site.name.endswith(f"[{role}]")
        assert {h.name for h in heads} == {site.name}


@pytest.mark.parametrize("granularity", ["matrix", "head"])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_rows_are_those_of_the_selected_weight(
    model: nn.Module, granularity: Any, axis: dd.decomposition.Axis
) -> None:
    """A row of a part or of a head is `weight_change` of just these rows of the weight."""
    recorder = dd.Recorder(
        model, ["query", "value"], method="FT", granularity=granularity, axis=axis
    )
    before = {s.tensor: model.get_submodule(s.module).get_parameter("weight").detach().clone()
              for s in recorder.sites}  # fmt: skip
    recorder.record()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    recorder.step = 1
    recorder.record()
    table = recorder.trajectory.query("step == 1")
    assert len(table) == len(recorder.sites)
    for site, (_, row) in zip(recorder.sites, table.iterrows(), strict=True):
        now = model.get_submodule(site.module).get_parameter("weight").detach()
        index = [r for start, stop in site.rows or () for r in range(start, stop)]
        w, v = ((t.T if site.stored_transposed else t)[index] for t in (before[site.tensor], now))
        expected = dd.weight_change(w, v, axis)
        assert row["units"] == len(expected.units)
        assert site.head is None if granularity == "matrix" else row["head"] == site.head
        for column in ("delta_magnitude", "delta_direction", "update_norm", "magnitude_before"):
            assert row[column] == pytest.approx(getattr(expected, column), rel=1e-6)


def test_low_rank_parts() -> None:
    """LoRA and DoRA on a fused weight: the rows of B and of m that belong to the part."""
    for adapt in (dd.apply_lora, dd.apply_dora):
        model: Any = build("GPT-2")
        parts = find_sites(model, ["query", "key"], "head")
        before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
        adapt(model, ["c_attn"], rank=2)
        recorder = dd.Recorder(model, ["query", "key"], granularity="head")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "magnitude" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        recorder.record()
        after = model.transformer.h[0].attn.c_attn.weight.detach()
        for site, row in zip(parts, recorder.trajectory.itertuples(), strict=True):
            expected = dd.weight_change(
                site.oriented(before).contiguous(), site.oriented(after).contiguous()
            )
            assert row.head == site.head
            assert row.delta_magnitude == pytest.approx(expected.delta_magnitude, rel=1e-4)
            assert row.delta_direction == pytest.approx(expected.delta_direction, rel=1e-4)


def test_cross_attention_of_gpt2_holds_keys_and_values() -> None:
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=HEADS, vocab_size=32, add_cross_attention=True, **IDS
    )
    model = transformers.GPT2Model(config)
    found = {
        s.role: s for s in find_sites(model, ["cross_query", "cross_key", "cross_value"], "matrix")
    }
    assert found["cross_query"].name == "h.0.crossattention.q_attn"
    assert found["cross_key"].rows == ((0, WIDTH),)
    assert found["cross_value"].rows == ((WIDTH, 2 * WIDTH),)
    assert found["cross_value"].name == "h.0.crossattention.c_attn[value]"


def test_torch_multihead_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 24)
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    sites = {s.role: s for s in find_sites(model, ["query", "cross_value", "up", "down"], "matrix")}
    assert sites["query"].name == "layers.0.self_attn.in_proj_weight[query]"
    assert sites["query"].rows == ((0, WIDTH),)
    assert sites["cross_value"].name == "layers.0.multihead_attn.in_proj_weight[value]"
    assert sites["up"].name == "layers.0.linear1"
    heads = find_sites(model, ["value"], "head")
    assert [h.rows for h in heads] == [((32 + 4 * i, 36 + 4 * i),) for i in range(HEADS)]
    recorder = dd.Recorder(model, ["value"], granularity="head")
    with torch.no_grad():
        layer.self_attn.in_proj_weight[36:40] *= 2
    recorder.record()
    assert (recorder.trajectory["delta_magnitude"] > 0).tolist() == [False, True, False, False]


class TestNothingIsGuessed:
    def test_unknown_model_keeps_its_fused_weight_whole(self) -> None:
        model = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": nn.Linear(8, 24)})})
        (site,) = find_sites(model, ["c_attn"], "matrix")
        assert (site.role, site.rows) == ("query_key_value", None)
        with pytest.raises(NoSiteMatchesError, match="query_key_value"):
            find_sites(model, ["query"], "matrix")

    def test_shape_that_contradicts_the_configuration(self) -> None:
        config = {"model_type": "gpt2", "n_head": 4, "n_embd": 16}
        name = "h.0.attn.c_attn.weight"
        assert len(describe_tensor(name, (16, 48), config)) == 3
        (site,) = describe_tensor(name, (16, 40), config)
        assert site.rows is None

    def test_codegen_orders_its_parts_in_its_own_way(self) -> None:
        config = transformers.CodeGenConfig(
            n_embd=16, n_layer=1, n_head=4, vocab_size=32, rotary_dim=2, **IDS
        )
        model = transformers.CodeGenForCausalLM(config)
        (site,) = find_sites(model, ["qkv_proj"], "matrix")
        assert site.rows is None
        with pytest.raises(NoSiteMatchesError):
            find_sites(model, ["query"], "matrix")

    def test_path_of_a_fused_weight_is_the_whole_of_it(self) -> None:
        model = build("GPT-2")
        for target in ("c_attn", "query_key_value", "transformer.h.*.attn.c_attn"):
            assert [s.rows for s in find_sites(model, [target], "matrix")] == [None]
        (part,) = find_sites(model, ["transformer.h.0.attn.c_attn[key]"], "matrix")
        assert part.role == "key"
