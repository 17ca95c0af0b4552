"""The experiment behind the study: data, models of each shape, optimizers, sweeps."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dora_dynamics as dd
from analyses.finetuning import pairs, sweep
from analyses.finetuning.pairs import Pair
from analyses.finetuning.recipe import Recipe
from analyses.finetuning.sweep import Job
from analyses.finetuning.task import PairModel, make_task
from analyses.finetuning.training import adapt, decays, fine_tune, make_optimizer, order_of

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def tiny(shape: str) -> PreTrainedModel:
    from transformers import BartConfig, BartModel, BertConfig, BertModel, LlamaConfig, LlamaModel

    size: dict[str, Any] = {
        "vocab_size": 12,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    if shape == "encoder":
        return BertModel(BertConfig(num_hidden_layers=2, **size))
    if shape == "decoder":
        return LlamaModel(LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, **size))
    layers: dict[str, Any] = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 12,
        "decoder_ffn_dim": 12,
    }
    heads: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartModel(BartConfig(vocab_size=12, d_model=8, pad_token_id=0, **layers, **heads))


@pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder-decoder"])
def test_every_shape_of_model_learns_the_pairs(
    shape: str, some_pairs: list[Pair], tokenizer: Any, tmp_path: Path
) -> None:
    task = make_task(some_pairs, 10, tokenizer)
    base = PairModel(tiny(shape), len(task.labels))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    held_out = base.score(task.train)
    recipe = Recipe("FT", steps=30, batch_size=10, learning_rate=1e-2)
    seen = replace(task, held_out=task.train)
    tuned = fine_tune(base, seen, recipe, 0, tmp_path / "run", capture=True)
    learned = tuned.score
    assert tuned.trained_parameters == sum(p.numel() for p in base.backbone.parameters())
    assert learned.loss < held_out.loss - 0.3
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    table = dd.load_runs(tmp_path / "run")
    assert set(table["role"]) == {"query", "value"}
    stacks = set(table["stack"])
    assert stacks == ({"encoder", "decoder"} if shape == "encoder-decoder" else stacks)
    assert (table.loc[table["step"] == 30, "delta_direction"] > 0).all()


def test_an_encoder_is_trained_though_the_decoder_does_without_it(
    some_pairs: list[Pair], tokenizer: Any
) -> None:
    task = make_task(some_pairs, 10, tokenizer)
    model = PairModel(tiny("encoder-decoder"), len(task.labels))
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "encoder_attn.out_proj" in name:
                parameter.zero_()
    model.loss(task.train).backward()
    query = {
        stack: model.backbone.get_submodule(f"{stack}.layers.0.self_attn.q_proj").weight.grad
        for stack in ("encoder", "decoder")
    }
    size = {stack: float(torch.linalg.norm(gradient)) for stack, gradient in query.items()}
    assert 0.01 < size["encoder"] / size["decoder"] < 100


def test_padding_changes_nothing(some_pairs: list[Pair], tokenizer: Any) -> None:
    task = make_task(some_pairs, 10, tokenizer)
    model = PairModel(tiny("encoder"), len(task.labels)).double().eval()
    queries, texts = task.train.queries, task.train.texts
    together = model.embed(queries.beside(texts))
    apart = torch.cat([model.embed(queries.trimmed()), model.embed(texts.trimmed())])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


def test_what_decays() -> None:
    for method, names in {
        "DoRA": {"all": {"lora_A", "lora_B", "magnitude"}, "magnitude": {"magnitude"},
                 "factors": {"lora_A", "lora_B"}, "none": set()},
        "LoRA": {"all": {"lora_A", "lora_B"}, "magnitude": set(), "none": set()},
    }.items():  # fmt: skip
        model = PairModel(tiny("encoder"), 2)
        adapt(model, Recipe(method, rank=2))
        for decay_on, expected in names.items():
            found = {
                name.rpartition(".")[2]
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and decays(name, parameter, decay_on)  # type: ignore[arg-type]
            }
            assert found == expected
    model = PairModel(tiny("encoder"), 2)
    adapt(model, Recipe("FT"))
    exempt = {n for n, p in model.named_parameters() if not decays(n, p, "all")}
    assert exempt == {
        n
        for n, _ in model.named_parameters()
        if n.endswith("bias") or "LayerNorm" in n or "head." in n
    }
    with pytest.raises(ValueError, match="none of FT"):
        adapt(model, Recipe("LORA"))


@pytest.mark.parametrize(
    ("name", "kind", "decay"),
    [
        ("adamw", "AdamW", True),
        ("adam_l2", "Adam", True),
        ("adam", "Adam", False),
        ("sgd", "SGD", True),
    ],
)
def test_optimizers(name: Any, kind: str, decay: bool) -> None:
    model = PairModel(tiny("encoder"), 2)
    recipe = Recipe("FT", steps=10, learning_rate=1e-3, total_decay=0.1, optimizer=name)
    adapt(model, recipe)
    optimizer = make_optimizer(model, recipe)
    assert type(optimizer).__name__ == kind
    assert {g["weight_decay"] for g in optimizer.param_groups} == {recipe.weight_decay * decay, 0.0}
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(list(model.parameters()))


def test_no_batch_holds_an_example_twice() -> None:
    order = order_of(20, Recipe("FT", steps=9, batch_size=12), seed=1)
    assert order.shape == (9, 12)
    assert all(len(set(batch.tolist())) == 12 for batch in order)
    assert torch.equal(order, order_of(20, Recipe("FT", steps=9, batch_size=12), seed=1))
    assert not torch.equal(order, order_of(20, Recipe("FT", steps=9, batch_size=12), seed=2))


def test_pairs_from_a_file(tmp_path: Path, some_pairs: list[Pair]) -> None:
    file = tmp_path / "pairs.jsonl"
    pairs.write(some_pairs, file)
    assert pairs.read(str(file)) == some_pairs
    file.write_text('{"question": "a b", "answer": "c", "n": 3}\n\n{"text": "t", "query": "q"}\n')
    assert pairs.read(str(file)) == [Pair("a b", "c"), Pair("q", "t")]
    assert pairs.digest(some_pairs) != pairs.digest(some_pairs[:-1])
    for content, said in {
        '{"text": "only"}': "must hold two texts",
        "[1, 2]": "no JSON object",
        "no json": "is not JSONL",
    }.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=said):
            pairs.read(str(file))


def test_pairs_from_a_data_set(
    tmp_path: Path, some_pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pairs.write(some_pairs, tmp_path / "corpus" / "train.jsonl")
    assert pairs.read(str(tmp_path / "corpus")) == some_pairs


def test_a_run_that_fails_leaves_no_outcome_of_the_one_it_replaces(tmp_path: Path) -> None:
    job = Job("one", Recipe("none of these"), 0, may_fail=True)
    old = tmp_path / "one" / "outcome.json"
    old.parent.mkdir()
    old.write_text("{}")
    found = sweep._outcome(PairModel(tiny("encoder"), 2), None, job, tmp_path)  # type: ignore[arg-type]
    assert "none of FT, LoRA and DoRA" in found["error"]
    assert not old.exists()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_sweep_over_processes_is_a_sweep_in_one(
    some_pairs: list[Pair], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    tiny("encoder").save_pretrained(model)
    tokenizer.save_pretrained(model)
    pairs.write(some_pairs, data)
    jobs = [
        Job(
            f"{method}-{decay}",
            Recipe(method, 4, 6, total_decay=decay, rank=2),
            0,
            {"total": decay},
        )
        for method in ("FT", "DoRA")
        for decay in (0.0, 0.1)
    ]
    parser = argparse.ArgumentParser()
    sweep.add_options(parser, "sweep", steps=4, batch_size=6, seeds=1)
    common = ["--model", str(model), "--data", str(data), "--held-out", "10", "--device", "cpu"]
    tables = {}
    for workers in (1, 2):
        out = ["--workers", str(workers), "--out", str(tmp_path / f"with-{workers}")]
        options = parser.parse_args([*common, *out])
        done = sweep.run_or_read(options, jobs)
        assert list(done.scores["job"]) == [job.name for job in jobs]
        tables[workers] = done.trajectory(count=None)
        again = sweep.run_or_read(parser.parse_args([*common, *out, "--redraw"]), jobs)
        assert again.trajectory(count=None).equals(tables[workers])
        about = json.loads(sweep.results(options).read_text())
        assert about["pairs"] == 40
        assert len(about["recipes"]) == 4

    (tmp_path / "with-1/runs/sweep/FT-0.1/outcome.json").unlink()
    cut = tmp_path / "with-1/runs/sweep/DoRA-0.1"
    (cut / "outcome.json").unlink()
    rows = (cut / "trajectory.csv").read_text().splitlines(keepends=True)
    (cut / "trajectory.csv").write_text("".join(rows[:-4]))
    out = ["--workers", "1", "--out", str(tmp_path / "with-1")]
    empty = tmp_path / "with-1/runs/sweep/FT-0.0"  # failed before its first row
    (empty / "outcome.json").rename(tmp_path / "kept.json")
    (empty / "trajectory.csv").rename(tmp_path / "kept.csv")
    (empty / "trajectory.csv").write_text(rows[0])
    sweep.results(parser.parse_args(out)).unlink()
    drawn = sweep.run_or_read(parser.parse_args([*common, *out, "--redraw"]), jobs)
    assert drawn.about["unfinished"] == ["FT-0.0", "DoRA-0.1"]
    assert [job["retrieval"] is None for job in drawn.about["jobs"]] == [True, False]
    assert "runs_by_machine" not in drawn.about
    (tmp_path / "kept.json").rename(empty / "outcome.json")
    (tmp_path / "kept.csv").rename(empty / "trajectory.csv")
    for name in ("FT-0.0", "FT-0.1", "DoRA-0.0"):
        file = tmp_path / f"with-1/runs/sweep/{name}/run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "elsewhere"}))
    resumed = sweep.run_or_read(parser.parse_args([*common, *out, "--resume"]), jobs)
    assert resumed.trajectory(count=None).equals(tables[1])
    assert resumed.about["machine"] == "elsewhere"
    assert [place["runs"] for place in resumed.about["runs_by_machine"]] == [2, 2]
    assert not resumed.scores["retrieval"].isna().any()  # what has none is made again

    longer = [replace(job, recipe=replace(job.recipe, steps=5)) for job in jobs[:1]]
    more = sweep.run_or_read(parser.parse_args([*common, *out, "--resume"]), [*longer, *jobs[1:]])
    last = more.trajectory(count=None).groupby("run")["step"].max()
    assert last.to_dict() == {job.name: 4 for job in jobs} | {"FT-0.0": 5}
    pairs.write(some_pairs[:-1], data)
    with pytest.raises(SystemExit, match="started from another data: give what they started from"):
        sweep.run_or_read(parser.parse_args([*common, *out, "--resume"]), jobs)
    monkeypatch.setattr(sweep, "_outcome", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_or_read(parser.parse_args([*common, *out]), jobs)
    assert not list((tmp_path / "with-1/runs/sweep").glob("*/outcome.json"))  # of other data

    measures = ["method", "total", "seed", "step", "site"]
    assert tables[1][measures].equals(tables[2][measures])
    for name in ("delta_magnitude", "delta_direction", "total_decay"):
        torch.testing.assert_close(
            torch.tensor(tables[1][name].to_numpy()), torch.tensor(tables[2][name].to_numpy()),
            rtol=1e-4, atol=1e-8,
        )  # fmt: skip
