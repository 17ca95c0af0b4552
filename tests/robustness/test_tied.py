"""One tensor under several names: one row, and every name finds it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file, save_model
from torch import nn

import dora_dynamics as dd
from dora_dynamics.cli import main as cli
from dora_dynamics.runs.directory import read_info


def tied_model() -> Any:
    """An embedding tied to the head, and one module used in two places."""
    shared = nn.Linear(5, 5)
    model: Any = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(7, 5),
            "query": shared,
            "again": nn.ModuleDict({"key": shared}),
            "value": nn.Linear(5, 5),
            "lm_head": nn.Linear(5, 7, bias=False),
        }
    )
    model["lm_head"].weight = model["embed_tokens"].weight
    return model


NAMES = {"embed_tokens": ["lm_head"], "query": ["again.key"]}


def test_tied_weights_and_shared_modules_are_recorded_once_under_both_names(tmp_path: Any) -> None:
    model = tied_model()
    before = {name: model[name].weight.detach().clone() for name in NAMES}
    targets = ["embed_tokens", "lm_head", "query", "again.key", "value"]
    captured = dd.capture_baseline(model, targets)
    recorder = dd.Recorder(model, targets, every=1, run_dir=tmp_path / "r", baseline=captured)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.attach(optimizer):
        hidden = model["again"]["key"](model["query"](model["embed_tokens"](torch.arange(7))))
        torch.autograd.backward(model["lm_head"](model["value"](hidden)).square().sum())
        optimizer.step()
    table = dd.load_runs(tmp_path / "r")
    assert table["site"].tolist() == ["embed_tokens", "query", "value"] * 2
    for name, weight in before.items():
        expected = dd.weight_change(weight, model[name].weight.detach()).delta_direction
        (found,) = table.query("step == 1 and site == @name")["delta_direction"]
        assert found == pytest.approx(expected, rel=1e-6)
    info = read_info(tmp_path / "r")
    assert info.also_known_as == NAMES
    assert list(captured.weights) == [
        f"{name}.weight" for name in ("embed_tokens", "query", "value")
    ]
    shown = CliRunner().invoke(cli, ["runs", str(tmp_path / "r")]).output
    assert "embed_tokens is also lm_head" in shown
    assert "query is also again.key" in shown


@pytest.mark.parametrize(
    ("target", "site", "other"),
    [
        ("lm_head", "lm_head", "embed_tokens"),
        ("embed_tokens", "embed_tokens", "lm_head"),
        ("again.key", "query", "again.key"),
        ("key", "query", "again.key"),
        ("again.*", "query", "again.key"),
        (re.compile("again"), "query", "again.key"),
        ("query", "query", "again.key"),
    ],
)
def test_either_name_selects_a_weight_of_two(target: Any, site: str, other: str) -> None:
    (found,) = dd.Recorder(tied_model(), [target]).sites
    assert (found.name, found.also_known_as) == (site, (other,))


def test_parts_of_a_shared_fused_weight_know_their_other_names() -> None:
    shared = nn.MultiheadAttention(6, 2)
    model = nn.ModuleDict({"first": shared, "second": shared})
    sites = dd.Recorder(model, ["query", "out_proj"], granularity="matrix").sites
    assert [site.also_known_as for site in sites] == [
        ("second.in_proj_weight[query]",), ("second.out_proj",),
    ]  # fmt: skip
    heads = dd.Recorder(model, ["second.in_proj_weight"], granularity="head").sites
    assert [(site.name, site.head) for site in heads] == [
        (f"first.in_proj_weight[{part}]", head)
        for part in ("query", "key", "value")
        for head in range(2)
    ]


def test_an_adapter_on_a_tied_weight_makes_two_of_it() -> None:
    model = tied_model()
    recorder = dd.Recorder(model, ["embed_tokens", "lm_head"])
    dd.apply_lora(model, ["lm_head"], rank=2)
    assert [site.name for site in dd.Recorder(model, ["embed_tokens", "lm_head"]).sites] == [
        "embed_tokens", "lm_head",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match=r"lm_head and embed_tokens were one .* are two now"):
        recorder.start(torch.optim.SGD(model.parameters(), lr=0.1))
    recorder.finish()


@pytest.mark.parametrize("form", ["torch", "noted", "architecture"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_checkpoints_of_tied_weights_have_one_row_found_by_either_name(
    form: str, target: str, tmp_path: Any
) -> None:
    model = tied_model()
    for name in ("base", "tuned"):
        if form == "torch":
            torch.save(model.state_dict(), tmp_path / f"{name}.pt")
        elif form == "noted":
            save_model(model, str(tmp_path / f"{name}.safetensors"))
        else:
            (tmp_path / name).mkdir()
            save_file(
                {
                    f"model.{k}": v.clone()
                    for k, v in model.state_dict().items()
                    if k != "lm_head.weight"
                },
                tmp_path / name / "model.safetensors",
            )
            config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        before = model["embed_tokens"].weight.detach().clone()
        with torch.no_grad():
            model["embed_tokens"].weight.mul_(1.01).add_(0.1)
    base, tuned = sorted(tmp_path.iterdir())
    table = dd.compare_checkpoints(base, tuned, [target], out=tmp_path / "run")
    assert len(table) == 1
    after = before
    with torch.no_grad():
        before = (after - 0.1) / 1.01
    expected = dd.weight_change(before, after)
    assert table["delta_direction"].item() == pytest.approx(expected.delta_direction, rel=1e-3)
    prefix = "model." if form == "architecture" else ""
    ((name, others),) = read_info(tmp_path / "run").also_known_as.items()
    assert {name, *others} == {f"{prefix}embed_tokens", "lm_head"}
    done = CliRunner().invoke(cli, ["sites", str(base), "--targets", target, "--json"])
    (described,) = json.loads(done.output)
    assert {described["site"], *described["also_known_as"]} == {f"{prefix}embed_tokens", "lm_head"}
    both = f"{target},{'embed_tokens' if target == 'lm_head' else 'lm_head'}"
    for words in (["--all"], []):
        done = CliRunner().invoke(cli, ["sites", str(base), "--targets", both, *words])
        assert done.output.count("lm_head") == 1, done.output


def test_a_checkpoint_whose_head_is_no_longer_tied_says_so(tmp_path: Any) -> None:
    model = tied_model()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    model["lm_head"].weight = nn.Parameter(torch.randn(7, 5))
    torch.save(model.state_dict(), tmp_path / "tuned.pt")
    table = dd.compare_checkpoints(tmp_path / "base.pt", tmp_path / "tuned.pt", ["embed_tokens"])
    (checkpoint,) = table.attrs["summary"]["checkpoints"]
    assert checkpoint["notes"] == [
        "lm_head.weight is embed_tokens in the base, and here it may be a weight of its own: it is "
        "left out"
    ]
