"""Every recipe of the study at its smallest setting, and what it computes against references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from analyses import (
    adapter_zoo,
    decay_placement,
    gradient_geometry,
    heads_and_norms,
    merge,
    pretrain,
    rank,
    reproduce,
    sign_map,
    update_geometry,
    weight_decay,
)
from dora_dynamics.paper import published_points

HELD_OUT = ["--held-out", "10"]


def drawn(out: Path, name: str) -> bool:
    return all((out / "figures" / f"{name}.{e}").stat().st_size > 5000 for e in ("png", "svg"))


def test_weight_decay(small: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    weight_decay.main([*small, *HELD_OUT, *out, "--seeds", "2", "--totals", "0", "0.1"])
    table = pd.read_csv(tmp_path / "analyses/results/weight_decay.csv")
    assert len(table) == 2 * 2 * 2 * 3 * 2
    points = pd.read_csv(tmp_path / "analyses/results/weight_decay_prediction.csv")
    full = points[(points["method"] == "FT") & (points["total"] == 0.1)]
    np.testing.assert_allclose(full["predicted"], np.exp(-0.1) - 1, atol=2e-3)
    np.testing.assert_allclose(full["measured"], full["predicted"], atol=2e-3)
    shares = pd.read_csv(tmp_path / "analyses/results/weight_decay_relative.csv")
    assert len(shares) == 2 * 2 * 3
    assert shares["r_direction_size"].abs().max() <= 1
    contrast = pd.read_csv(tmp_path / "analyses/results/weight_decay_contrast.csv")
    assert len(contrast) == 2 * 2 * 2
    assert drawn(tmp_path, "weight_decay")


def test_decay_placement(small: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    decay_placement.main([*small, *HELD_OUT, *out, "--seeds", "1", "--totals", "0", "0.1"])
    table = pd.read_csv(tmp_path / "analyses/results/decay_placement.csv")
    assert len(table) == 2 * 2 * 2 * (1 + 3)
    shrunk = table[table["total"] == 0.1].groupby("decay_on")["relative_change"].mean()
    assert shrunk["all"] < -0.08
    assert shrunk["magnitude"] < -0.08
    assert abs(shrunk["factors"]) < 0.02
    assert drawn(tmp_path, "decay_placement")


def test_sign_map(small: list[str], tmp_path: Path) -> None:
    sign_map.main([*small, *HELD_OUT, "--out", str(tmp_path), "--steps", "4"])
    table = pd.read_csv(tmp_path / "analyses/results/sign_map.csv")
    assert set(table["setting"]) >= {"middle", "rank 4", "SGD with momentum", "early checkpoints"}
    assert not ((table["method"] == "FT") & table["setting"].str.startswith("rank")).any()
    assert drawn(tmp_path, "sign_map")


def test_rank(small: list[str], tmp_path: Path) -> None:
    options = ["--seeds", "2", "--ranks", "2", "4", "--out", str(tmp_path)]
    rank.main([*small, *HELD_OUT, *options])
    shapes = pd.read_csv(tmp_path / "analyses/results/rank_spectrum.csv")
    used = shapes.groupby(["method", "rank"])["effective_rank"].max()
    assert used["LoRA", 2] <= 2 + 1e-4
    assert used["LoRA", 4] <= 4 + 1e-4
    assert used["DoRA", 4] > 4
    pairs = pd.read_csv(tmp_path / "analyses/results/rank_halved.csv")
    scores = pd.DataFrame(json.loads((tmp_path / "analyses/results/rank.json").read_text())["jobs"])
    means = scores.groupby(["method", "rank"])["retrieval"].mean()
    row = pairs[(pairs["dora_rank"] == 2) & (pairs["lora_rank"] == 4)].iloc[0]
    assert row["difference"] == pytest.approx(means["DoRA", 2] - means["LoRA", 4], abs=1e-4)
    wide = scores.pivot_table(index="seed", columns=["method", "rank"], values="retrieval")
    both = wide["DoRA"][[2, 4]].to_numpy() - wide["LoRA"][[2, 4]].to_numpy()
    apart = both.mean(axis=1)
    every = pairs[pairs["scope"] == "all ranks × 1"].iloc[0]
    half = stats.sem(apart) * stats.t.ppf(0.975, 1)
    ends = apart.mean() - half, apart.mean() + half
    np.testing.assert_allclose([every["low"], every["high"]], ends, atol=1e-4)
    assert drawn(tmp_path, "rank")


def test_the_shape_of_a_spectrum() -> None:
    even = rank.shape_of(np.ones(5))
    assert even["effective_rank"] == pytest.approx(5)
    assert even["top_share"] == pytest.approx(0.2)
    assert rank.shape_of(np.array([3.0, 0, 0]))["effective_rank"] == pytest.approx(1)


def test_heads_and_norms(small: list[str], tmp_path: Path) -> None:
    heads_and_norms.main([*small, *HELD_OUT, "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "analyses/results/heads_and_norms.csv")
    assert set(table["part"]) == {"query heads", "value heads", "norms"}
    path = pd.read_csv(tmp_path / "analyses/results/heads_and_norms_path.csv")
    last = path[path["step"] == 8].set_index(["method", "part"])
    assert (last["delta_direction_median"] > 0).all()
    assert drawn(tmp_path, "heads_and_norms")


def test_heads_inside_layers_count_layers_not_layers_times_seeds() -> None:
    rng = np.random.default_rng(4)
    layers, heads = 6, 12
    x = rng.uniform(0.1, 1, (layers, heads))
    y = rng.uniform(0.1, 1, (layers, heads)) - 0.5 * x
    one = pd.DataFrame(
        {
            "run": "seed0",
            "step": 9,
            "layer": np.repeat(np.arange(layers), heads),
            "head": np.tile(np.arange(heads), layers),
            "delta_direction": x.ravel(),
            "delta_magnitude": y.ravel(),
        }
    )
    same = pd.concat([one.assign(run=f"seed{seed}") for seed in range(3)])
    found = [heads_and_norms.heads_inside(rows).iloc[0] for rows in (one, same)]
    expected = np.mean([np.corrcoef(x[layer], y[layer])[0, 1] for layer in range(layers)])
    widths = [np.diff(np.arctanh([row["pearson_low"], row["pearson_high"]])) for row in found]
    assert found[1]["pearson"] == pytest.approx(expected)
    assert (found[1]["runs"], found[1]["layers"]) == (3, layers)
    assert widths[1] > 0.9 * widths[0]  # runs that repeat each other add nothing


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapter_zoo(small: list[str], tmp_path: Path) -> None:
    options = ["--methods", "LoRA", "PiSSA", "OFT", "VeRA", "--out", str(tmp_path)]
    adapter_zoo.main([*small, *HELD_OUT, *options])
    table = pd.read_csv(tmp_path / "analyses/results/adapter_zoo.csv")
    assert list(table["method"]) == ["FT", "LoRA", "PiSSA", "OFT", "VeRA"]
    assert table.set_index("method").loc["FT", "distance"] == 0
    assert (table["distance"][1:] > 0).all()
    ranks = table[list(adapter_zoo.MEASURES)].to_numpy().argsort(0).argsort(0) / len(table)
    apart = np.linalg.norm(ranks - ranks[0], axis=1)
    np.testing.assert_allclose(table["distance"], apart, rtol=1e-4)
    assert drawn(tmp_path, "adapter_zoo")


def test_the_zoo_has_every_method_that_changes_query_and_value() -> None:
    support = pd.read_csv(Path(__file__).parents[2] / "analyses/results/peft_support.csv")
    measured = set(support.loc[support["read"].notna(), "type"])
    elsewhere = {"BEFT", "LN_TUNING", "TRAINABLE_TOKENS"}
    assert measured - elsewhere == {kind for kind, _ in adapter_zoo.ZOO.values()}


def test_update_geometry_of_an_encoder_decoder(
    small: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import BartConfig, BartModel

    sizes: dict[str, Any] = {"encoder_layers": 3, "decoder_layers": 3, "pad_token_id": 0}
    for stack in ("encoder", "decoder"):
        sizes |= {f"{stack}_ffn_dim": 64, f"{stack}_attention_heads": 2}
    torch.manual_seed(0)
    BartModel(BartConfig(vocab_size=12, d_model=64, **sizes)).save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    out = ["--out", str(tmp_path)]
    shape = ["--model", str(tmp_path / "bart"), "--states", "decoder"]
    reproduce.main([*small, *HELD_OUT, *shape, *out, "--name", "runs"])
    stacks = pd.read_csv(tmp_path / "analyses/results/runs_stacks.csv")
    assert set(stacks["stack"]) == {"encoder", "decoder"}
    whole = pd.read_csv(tmp_path / "analyses/results/runs.csv")
    assert (whole["layers"] == 6).all()
    assert drawn(tmp_path, "runs")

    update_geometry.main([*out, "--runs", "runs", "--inputs", "64"])
    table = pd.read_csv(tmp_path / "analyses/results/update_geometry.csv")
    assert set(table["source"]) == {"runs", "paper"}
    assert drawn(tmp_path, "update_geometry")
    with pytest.raises(SystemExit, match="holds no runs"):
        update_geometry.main([*out, "--runs", "nothing"])


def test_the_orthogonal_curve_is_exact() -> None:
    generator = np.random.default_rng(0)
    w = generator.standard_normal((50, 9))
    d = generator.standard_normal((50, 9))
    d -= (d * w).sum(1, keepdims=True) / (w**2).sum(1, keepdims=True) * w
    m, after = np.linalg.norm(w, axis=1), np.linalg.norm(w + d, axis=1)
    turned = 1 - ((w + d) * w).sum(1) / (m * after)
    np.testing.assert_allclose(after - m, m * update_geometry.lengthening(turned), rtol=1e-12)


def test_the_fit_to_the_papers_points() -> None:
    points = published_points()
    lora = points[(points["role"] == "query") & (points["method"] == "LoRA")]
    x, y = lora["delta_direction"].to_numpy(float), lora["delta_magnitude"].to_numpy(float)
    curve = (x / (1 - x))[:, None]
    expected = np.linalg.lstsq(curve, y, rcond=None)[0][0]
    found = update_geometry.fitted(lora)
    assert found["magnitude"] == pytest.approx(expected)
    assert found["r_squared_line"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_gradient_geometry(small: list[str], tmp_path: Path) -> None:
    gradient_geometry.main([*small, "--batches", "6", "--out", str(tmp_path)])
    checks = pd.read_csv(tmp_path / "analyses/results/gradient_geometry_checks.csv")
    assert set(checks["equations"]) == {"Eq. 6, 7", "Eq. 11, 7"}
    assert (checks[["error_A", "error_B", "error_m"]] < 1e-12).all(axis=None)
    table = pd.read_csv(tmp_path / "analyses/results/gradient_geometry.csv")
    assert (table["r_equal_length"] < -0.8).all()
    assert drawn(tmp_path, "gradient_geometry")


def test_participation_is_that_of_the_covariance() -> None:
    gradients = torch.randn(7, 3, 12, generator=torch.Generator().manual_seed(0)).double()
    ratio, first = gradient_geometry.participation(gradients)
    for unit in range(3):
        covariance = np.cov(gradients[:, unit].numpy().T)
        values, vectors = np.linalg.eigh(covariance)
        assert ratio[unit].item() == pytest.approx(values.sum() ** 2 / (values**2).sum())
        assert abs(first[unit].numpy() @ vectors[:, -1]) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_merge(small: list[str], tmp_path: Path) -> None:
    merge.main([*small, "--rounds", "2", "--texts", "6", "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "analyses/results/merge.csv")
    assert set(table["method"]) == {"LoRA", "LoRA, PEFT", "DoRA", "DoRA, PEFT"}
    ours = ~table["method"].str.endswith("PEFT")
    assert (table.loc[ours, "merged_from_adapted"] == 0).all()
    assert (table["merged_from_adapted"] <= 4 * table["epsilon"]).all()
    assert table[ours].notna().all(axis=None)
    assert (table["merged_from_float64"] < 20 * table["epsilon"]).all()
    assert drawn(tmp_path, "merge")


@pytest.mark.parametrize("shape", ["bart", "llama"])
def test_pretrain(shape: str, tmp_path: Path) -> None:
    sizes = ["--width", "16", "--layers", "2", "--length", "48", "--batch-size", "4"]
    amounts = ["--vocabulary", "300", "--megabytes", "0.05", "--steps", "20"]
    given = ["--shape", shape, "--device", "cpu", "--learning-rate", "0.01"]
    pretrain.main([*given, *sizes, *amounts, "--out", str(tmp_path)])
    about = json.loads((tmp_path / f"analyses/results/pretrain_{shape}.json").read_text())
    losses = about["held_out_loss"]
    assert losses["after"] < losses["before"] - 0.2
    assert ("encoder_blind" in losses) == (shape == "bart")

    from analyses.finetuning import models

    model, tokenizer = models.load(tmp_path / "models" / shape)
    tokens = tokenizer("def walk(over): return hill", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(tokens[0]).strip() == "def walk(over): return hill"
    assert model(input_ids=tokens).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(("asked", "found"), [(0.0, 0.25), (0.02, 0.02)])
def test_the_first_weights_of_a_bart(asked: float, found: float) -> None:
    small = pretrain.Settings("bart", width=16, layers=2, vocabulary=300, initial_std=asked)
    weights = pretrain.make_model(small).get_parameter("model.encoder.layers.0.fc1.weight")
    assert weights.std().item() == pytest.approx(found, rel=0.1)


def test_each_stack_is_told_apart() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.1, 1, 12)
    rows = pd.DataFrame(
        {
            "run": "r",
            "method": "FT",
            "role": "query",
            "site": [f"s{n}" for n in range(12)],
            "step": 5,
            "stack": ["encoder"] * 6 + ["decoder"] * 6,
            "layer": [*range(6), *range(6)],
            "delta_direction": x,
            "delta_magnitude": np.where(np.arange(12) < 6, x, 3 - x),
            "unit_coupling": 0.5,
            "unit_rank_coupling": 0.5,
            "unit_slope": 1.0,
            "units": 4,
        }
    )
    table = reproduce.stack_table(rows)
    within = table[table["level"] == "within_step"].set_index("stack")
    assert within["pearson"].to_dict() == pytest.approx({"encoder": 1, "decoder": -1})
    assert within.loc["encoder", "median_delta_direction"] == pytest.approx(np.median(x[:6]))
    assert reproduce.stack_table(rows.assign(stack="encoder")).empty


def test_noise_hides_spans() -> None:
    windows = torch.full((40, 500), 9)
    noisy = pretrain.noisy(windows, torch.Generator().manual_seed(0))
    hidden = noisy == pretrain.MASK
    assert 0.2 < hidden.float().mean() < 0.3
    assert (noisy[~hidden] == 9).all()
