"""PEFT adapters from their files, against PEFT loading and merging the same directory."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from dora_dynamics.checkpoints import CheckpointError, compare_checkpoints

from .adapters import merged, train_and_save
from .models import bert, check, gpt2, llama, state

if TYPE_CHECKING:
    from pathlib import Path

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7},
    "dora": {"r": 4, "lora_alpha": 7, "use_dora": True},
    "rslora": {"r": 4, "lora_alpha": 7, "use_rslora": True},
    "dora_rslora": {"r": 9, "lora_alpha": 7, "use_rslora": True, "use_dora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 7,
        "use_dora": True,
        "rank_pattern": {"layer.0.attention.self.query": 2, "dense": 3},
        "alpha_pattern": {r"encoder\.layer\.1\..*\.value": 20, "query": 3},
    },
    "eva_like": {"r": 4, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "all_bias": {"r": 4, "bias": "all"},
}


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("name", LORA)
def test_lora_and_dora(tmp_path: Path, name: str, axis: Any) -> None:
    targets = ["query", "value", "intermediate.dense"]
    config = peft.LoraConfig(target_modules=targets, **LORA[name])
    bert().save_pretrained(tmp_path / "base")
    train_and_save(bert(), config, tmp_path / "adapter")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter", axis=axis)
    assert len(table) == 6
    check(table, state(bert()), merged(bert(), tmp_path / "adapter"), axis=axis)
    assert set(table["method"]) == {"DoRA" if LORA[name].get("use_dora") else "LoRA"}


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dora", [False, True])
def test_conv1d_with_fan_in_fan_out(tmp_path: Path, axis: Any, *, dora: bool) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_fc", "attn.c_proj"], fan_in_fan_out=True, use_dora=dora
    )
    train_and_save(gpt2(), config, tmp_path / "adapter")
    after = merged(gpt2(), tmp_path / "adapter")
    (tmp_path / "base" / "config.json").unlink()
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter", axis=axis)
    assert len(table) == 6
    check(table, state(gpt2()), after, transposed=True, axis=axis)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dora", [False, True])
def test_embeddings(tmp_path: Path, axis: Any, *, dora: bool) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=dora)
    train_and_save(llama(), config, tmp_path / "adapter")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter", axis=axis)
    assert set(table["role"]) == {"embedding", "query"}
    check(table, state(llama()), merged(llama(), tmp_path / "adapter"), axis=axis)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rows", [50, 47, 53])
def test_embeddings_that_peft_saves_below_their_adapter(
    tmp_path: Path, axis: Any, rows: int, *, dora: bool
) -> None:
    def model() -> Any:
        resized = llama()
        if rows != 50:
            resized.resize_token_embeddings(rows, mean_resizing=False)
        return resized

    llama().save_pretrained(tmp_path / "base")
    targets = ["embed_tokens", "lm_head", "q_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, use_dora=dora)
    torch.manual_seed(3)
    start = model()
    train_and_save(start, config, tmp_path / "adapter", keep_base="auto")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter", axis=axis)
    assert set(table["role"]) == {"embedding", "query", "lm_head"}
    torch.manual_seed(3)
    shared = min(rows, 50)
    after = {
        name: weight[:shared] if weight.shape[0] == rows else weight
        for name, weight in merged(model(), tmp_path / "adapter").items()
    }
    before = {name: weight[:shared] if weight.shape[0] == 50 else weight
              for name, weight in state(llama()).items()}  # fmt: skip
    check(table, before, after, axis=axis)
    notes = table.attrs["summary"]["checkpoints"][0]["notes"]
    assert sum("resized from 50" in note for note in notes) == (0 if rows == 50 else 2)


def test_weights_below_an_adapter_that_are_not_the_base_are_counted(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], use_dora=True)
    train_and_save(llama(seed=9), config, tmp_path / "adapter", keep_base="auto")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter")
    check(table, state(llama()), merged(llama(seed=9), tmp_path / "adapter"))


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    def model(labels: int) -> Any:
        config = bert().config
        config.num_labels = labels
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)

    model(5).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    train_and_save(model(3), config, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"classifier.*has shape \(3, 24\)"):
        compare_checkpoints(tmp_path / "base", tmp_path / "adapter")


def test_modules_to_save(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    train_and_save(llama(), config, tmp_path / "adapter")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter")
    assert set(table["site"]) >= {"lm_head", "model.layers.0.self_attn.q_proj"}
    check(table, state(llama()), merged(llama(), tmp_path / "adapter"))


def test_convolutions(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 8, 3)
            self.mix = torch.nn.Conv2d(8, 6, 1)

        def forward(self, x: Any) -> Any:
            grid = self.mix(self.conv(x.view(3, 1, 8, 1).expand(3, 3, 8, 8) / 50.0))
            return {"last_hidden_state": grid, "logits": grid}

    torch.save(Net().state_dict(), tmp_path / "base.pt")
    config = peft.LoraConfig(r=2, target_modules=["conv", "mix"], use_dora=True)
    train_and_save(Net(), config, tmp_path / "adapter")
    table = compare_checkpoints(tmp_path / "base.pt", tmp_path / "adapter")
    check(table, Net().state_dict(), merged(Net(), tmp_path / "adapter"))


TUNERS: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {"total_step": 100, "init_r": 4, "target_r": 4},
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 8},
    "DeftConfig": {},
    "DeloraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 20},
    "GraloraConfig": {"r": 4, "gralora_k": 2},
    "HRAConfig": {"r": 4},
    "HiraConfig": {"r": 4},
    "IA3Config": {"feedforward_modules": ["intermediate.dense"]},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "MissConfig": {"r": 4},
    "OFTConfig": {"r": 0, "oft_block_size": 4},
    "OSFConfig": {},
    "PeanutConfig": {},
    "PveraConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 8},
    "ShiraConfig": {"r": 4},
    "SupertuningConfig": {},
    "VBLoRAConfig": {"num_vectors": 8, "vector_length": 4, "r": 2, "topk": 2},
    "VeraConfig": {"r": 4},
    "WaveFTConfig": {"n_frequency": 20},
}


@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.filterwarnings("ignore")
def test_the_other_tuners_layer_by_layer(tmp_path: Path, name: str) -> None:
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    if name in ("BOFTConfig", "VeraConfig"):
        pytest.importorskip("peft", "0.19", reason="before, PEFT did not build it in float64")
    targets = ["query", "value", "intermediate.dense"]
    config = getattr(peft, name)(target_modules=targets, **TUNERS[name])
    bert().save_pretrained(tmp_path / "base")
    train_and_save(bert(), config, tmp_path / "adapter")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter")
    assert len(table) == 6
    check(table, state(bert()), merged(bert(), tmp_path / "adapter"))
    assert (table["update_norm"] > 0).all()


def test_trained_tokens(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 3])
    train_and_save(llama(), config, tmp_path / "adapter")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter")
    check(table, state(llama()), merged(llama(), tmp_path / "adapter"))


def test_tuned_norms(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    config = peft.LNTuningConfig(target_modules=["LayerNorm"])
    train_and_save(bert(), config, tmp_path / "adapter")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter", ["norm"])
    after = merged(bert(), tmp_path / "adapter")
    wanted = after["embeddings.LayerNorm.weight"].norm() - torch.ones(24).double().norm()
    row = table[table["site"] == "embeddings.LayerNorm"].iloc[0]
    assert row["delta_magnitude"] == pytest.approx(float(wanted.abs()), rel=1e-6)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.filterwarnings("ignore")
def test_a_changed_base_is_refused_with_the_way_out(tmp_path: Path, init: str) -> None:
    bert().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=init)
    train_and_save(bert(), config, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=f"{init}.*path_initial_model_for_weight_conversion"):
        compare_checkpoints(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_pissa_saved_with_conversion_is_ordinary_lora(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(bert(), config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(str(tmp_path / "initial"))
    adapted.peft_config["default"].init_lora_weights = "pissa"
    layer = adapted.base_model.model.encoder.layer[0].attention.self.query
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1)
    adapted.save_pretrained(
        str(tmp_path / "adapter"),
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter")
    check(table.iloc[:1], state(bert()), merged(bert(), tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("name", "options"),
    [("PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "FEATURE_EXTRACTION"})],
)
def test_what_changes_no_weight_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    bert().save_pretrained(tmp_path / "base")
    peft.get_peft_model(bert(), getattr(peft, name)(**options)).save_pretrained(
        str(tmp_path / "adapter")
    )
    with pytest.raises(CheckpointError, match="merge"):
        compare_checkpoints(tmp_path / "base", tmp_path / "adapter")


def test_the_adapter_names_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert().save_pretrained(tmp_path / "base")
    model = bert().from_pretrained(tmp_path / "base")
    train_and_save(model, peft.LoraConfig(r=2, target_modules=["query"]), tmp_path / "adapter")
    table = compare_checkpoints(None, tmp_path / "adapter")
    assert table.equals(compare_checkpoints(tmp_path / "base", tmp_path / "adapter"))


def test_another_base_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    gpt2().save_pretrained(tmp_path / "other")
    llama(head_dim=8).save_pretrained(tmp_path / "sizes")
    train_and_save(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    for other in ("other", "sizes"):
        with pytest.raises(CheckpointError, match="another base"):
            compare_checkpoints(tmp_path / other, tmp_path / "adapter")


def test_factors_and_configuration_must_agree(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    train_and_save(bert(), peft.LoraConfig(r=4, target_modules=["query"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    good = json.loads(file.read_text())
    for change, match in (
        ({"r": 8}, "has rank 4 but adapter_config.json says 8"),
        ({"use_dora": True}, "has no magnitude"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"peft_type": "LILY"}, "merge it"),
        ({"alora_invocation_tokens": [1]}, "some tokens only"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=re.escape(match)):
            compare_checkpoints(tmp_path / "base", tmp_path / "adapter")


def test_negative_magnitudes_turn_their_units(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bert().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["query"], use_dora=True)
    train_and_save(bert(), config, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "magnitude" in name:
            tensors[name][::3] *= -1
    save_file(tensors, file)
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter")
    assert table["delta_direction"].max() > 0.5
    check(table, state(bert()), merged(bert(), tmp_path / "adapter"))


@pytest.mark.parametrize(
    "indices", [[1, 3], {"embed_tokens": [3, 1, 7]}, {"embed_tokens": [3], "lm_head": [2, 5]}]
)
def test_trained_tokens_beside_lora(tmp_path: Path, indices: Any) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], use_dora=True, trainable_token_indices=indices
    )
    train_and_save(llama(), config, tmp_path / "adapter")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "adapter")
    assert len(table) == 2 + (len(indices) if isinstance(indices, dict) else 1)
    check(table, state(llama()), merged(llama(), tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    good = json.loads(file.read_text())
    for change in ([1, 3000], None, [1], ["a", "b"], {"other": [1]}):
        file.write_text(json.dumps({**good, "trainable_token_indices": change}))
        with pytest.raises(CheckpointError, match="token"):
            compare_checkpoints(tmp_path / "base", tmp_path / "adapter")


def test_without_peft_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert().save_pretrained(tmp_path / "base")
    names = {"loha": peft.LoHaConfig(r=2), "ia3": peft.IA3Config(feedforward_modules=[])}
    for name, config in {**names, "vera": peft.VeraConfig(r=2)}.items():
        config.target_modules = ["query"]
        train_and_save(bert(), config, tmp_path / name)
    train_and_save(bert(), peft.LoraConfig(r=2, target_modules=["query"]), tmp_path / "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in ("loha", "ia3", "vera"):
        with pytest.raises(CheckpointError, match=re.escape("pip install 'dora-dynamics[hf]'")):
            compare_checkpoints(tmp_path / "base", tmp_path / name)
    assert len(compare_checkpoints(tmp_path / "base", tmp_path / "lora")) == 2


def test_an_adapters_tensors_without_its_configuration(tmp_path: Path) -> None:
    """Their scaling is not in them: it is not guessed."""
    bert().save_pretrained(tmp_path / "base")
    train_and_save(bert(), peft.LoraConfig(r=2, target_modules=["query"]), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "loose.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: put the two into one folder"):
        compare_checkpoints(tmp_path / "base", tmp_path / "loose.safetensors")
