"""`dora-dynamics sites` on folders of weights, on a bare configuration, and on mistakes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from dora_dynamics.cli import main

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=4, vocab_size=32, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a config.json: the structure is built, no weight is."""
    folder = tmp_path_factory.mktemp("falcon")
    config = transformers.FalconConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, vocab_size=32,
        new_decoder_architecture=True, num_kv_heads=2, architectures=["FalconForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["sites", *map(str, arguments)])


def test_one_line_for_each_role(gpt2: Path) -> None:
    result = invoke(gpt2)
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    for role in ("query", "key", "value", "output", "up", "down", "norm", "embedding"):
        assert role in lines
    assert "16 × 16" in lines["query"]
    assert "stored transposed" in lines["query"]
    assert lines["query"].split()[1:3] == ["3", "0–2"]


def test_json_has_every_site(gpt2: Path) -> None:
    result = invoke(gpt2, "--json", "--targets", "query,/mlp\\.c_fc/")
    found = json.loads(result.output)
    assert [site["role"] for site in found] == ["query", "up"] * 3
    assert found[0]["site"].endswith("h.0.attn.c_attn[query]")
    assert (found[0]["units"], found[0]["features"], found[0]["layer"]) == (16, 16, 0)
    assert found[0]["rows"] == [[0, 16]]


def test_heads_of_a_bare_configuration(falcon: Path) -> None:
    result = invoke(falcon, "--granularity", "head", "--targets", "query,key", "--json")
    found = json.loads(result.output)
    heads = [(site["layer"], site["role"], site["head"]) for site in found]
    assert heads == [
        (layer, role, head)
        for layer in range(2)
        for role, count in (("query", 4), ("key", 2))
        for head in range(count)
    ]
    assert {site["units"] for site in found} == {4}


def test_every_site_on_a_line(falcon: Path) -> None:
    result = invoke(falcon, "--all", "--targets", "output")
    assert [line.split()[0] for line in result.output.splitlines()] == [
        "site",
        "transformer.h.0.self_attention.dense",
        "transformer.h.1.self_attention.dense",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "kwery"], "no linear layer matches the target 'kwery'"),
        (["--targets", "up", "--granularity", "head"], "nothing that is selected has"),
    ],
)
def test_mistakes_are_one_line(gpt2: Path, arguments: list[str], message: str) -> None:
    result = invoke(gpt2, *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert result.output.count("\n") == 1


def test_model_that_is_not_there(tmp_path: Path) -> None:
    result = invoke(tmp_path / "nothing")
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_help_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from click.testing import CliRunner\n"
        "from dora_dynamics.commands.sites import sites\n"
        "assert CliRunner().invoke(sites, ['--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
