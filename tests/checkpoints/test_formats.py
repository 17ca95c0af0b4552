"""Every format of full weights, written by the library that writes it."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from dora_dynamics.checkpoints import CheckpointError, compare_checkpoints

from .models import bert, check, gpt2, nudge, state

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = ["query", "value"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_one_safetensors_file_and_sharded_ones(base: Path, tmp_path: Path) -> None:
    before, after = state(bert()), state(nudge(bert()))
    nudge(bert()).save_pretrained(tmp_path / "one")
    nudge(bert()).save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one = compare_checkpoints(base, tmp_path / "one", TARGETS)
    many = compare_checkpoints(base, tmp_path / "many", TARGETS)
    check(one, before, after)
    assert one.equals(many)
    assert set(one["role"]) == {"query", "value"}
    assert list(one["method"].unique()) == ["FT"]


def test_bin_shards_with_an_index(base: Path, tmp_path: Path) -> None:
    after = state(nudge(bert()))
    names = list(after)
    folder = tmp_path / "bin"
    folder.mkdir()
    shards = {"pytorch_model-00001-of-00002.bin": names[::2],
              "pytorch_model-00002-of-00002.bin": names[1::2]}  # fmt: skip
    for file, held in shards.items():
        torch.save({name: after[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check(compare_checkpoints(base, folder, TARGETS), state(bert()), after)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("nest", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model.bert."])
def test_state_dicts(
    base: Path, tmp_path: Path, suffix: str, nest: str | None, prefix: str
) -> None:
    after = state(nudge(bert()))
    content: dict[str, Any] = {prefix + name: tensor for name, tensor in after.items()}
    if nest is not None:
        content = {nest: content, "optimizer": {"state": {}}, "epoch": 3}
    file = tmp_path / f"state{suffix}"
    torch.save(content, file)
    check(compare_checkpoints(base, file, TARGETS), state(bert()), after)


def test_a_file_from_before_torch_1_6(base: Path, tmp_path: Path) -> None:
    after = state(nudge(bert()))
    torch.save(after, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    check(compare_checkpoints(base, tmp_path / "old.pt", TARGETS), state(bert()), after)


def test_a_single_safetensors_file_on_both_sides(tmp_path: Path) -> None:
    before, after = state(bert()), state(nudge(bert()))
    safetensors.torch.save_file(before, tmp_path / "a.safetensors")
    safetensors.torch.save_file(after, tmp_path / "b.safetensors")
    table = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors", TARGETS)
    check(table, before, after)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_conv1d_stores_its_weights_the_other_way(tmp_path: Path, axis: Any) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    nudge(gpt2()).save_pretrained(tmp_path / "tuned")
    targets = ["*.attn.c_attn", "*.attn.c_proj", "*.mlp.c_fc"]
    table = compare_checkpoints(tmp_path / "base", tmp_path / "tuned", targets, axis=axis)
    assert len(table) == 6
    check(table, state(gpt2()), state(nudge(gpt2())), transposed=True, axis=axis)
    bare = [tmp_path / "base/model.safetensors", tmp_path / "tuned/model.safetensors"]
    for folder in ("base", "tuned"):
        (tmp_path / folder / "config.json").unlink()
    again = compare_checkpoints(bare[0], bare[1], targets, axis=axis)
    assert again.equals(table)


def test_a_square_weight_that_tells_no_axis_is_refused(tmp_path: Path) -> None:
    before = {"h.0.attn.c_proj.weight": torch.randn(8, 8)}
    after = {name: tensor + 0.1 * torch.randn(8, 8) for name, tensor in before.items()}
    safetensors.torch.save_file(before, tmp_path / "a.safetensors")
    safetensors.torch.save_file(after, tmp_path / "b.safetensors")
    files = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="--transposed"):
        compare_checkpoints(*files, ["*"])
    check(compare_checkpoints(*files, ["*"], transposed=["*"]), before, after, transposed=True)
    check(compare_checkpoints(*files, ["*"], transposed=["none"]), before, after)


def test_fused_weights_are_compared_in_their_parts(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    nudge(gpt2()).save_pretrained(tmp_path / "tuned")
    table = compare_checkpoints(tmp_path / "base", tmp_path / "tuned", ["query"])
    assert list(table["units"]) == [24, 24]
    heads = compare_checkpoints(
        tmp_path / "base", tmp_path / "tuned", ["query"], granularity="head"
    )
    assert list(heads["head"]) == [0, 1, 0, 1]
    means = heads.groupby("layer")["delta_magnitude"].mean().to_numpy()
    assert means == pytest.approx(table["delta_magnitude"].to_numpy(), rel=1e-12)


class _Distributed:
    """The state of a model as torch.distributed.checkpoint wants it, saved by one process."""

    @staticmethod
    def save(content: dict[str, Any], folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(content, checkpoint_id=folder)


@pytest.mark.parametrize("nested", [False, True])
def test_distributed_checkpoints(base: Path, tmp_path: Path, *, nested: bool) -> None:
    after = state(nudge(bert()))
    content: dict[str, Any] = dict(after)
    if nested:
        content = {"model": after, "optim": {"step": 3, "lr": torch.ones(3)}, "note": "text"}
    _Distributed.save(content, tmp_path / "step-70")
    table = compare_checkpoints(base, tmp_path / "step-70", TARGETS)
    check(table, state(bert()), after)
    assert list(table["step"].unique()) == [70]


def test_a_distributed_checkpoint_of_a_transposed_tensor(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    after = {"q_proj.weight": (weight + 0.1).T.contiguous().T}
    safetensors.torch.save_file({"q_proj.weight": weight}, tmp_path / "a.safetensors")
    _Distributed.save(dict(after), tmp_path / "dcp")
    table = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "dcp", ["q_proj"])
    check(table, {"q_proj.weight": weight}, after)


def test_lightning(base: Path, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"lr": 0.01, "name": "tiny"})
            self.model = bert()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(batch).last_hidden_state.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    tokens: Any = torch.arange(12).view(6, 2) % 50
    data: Any = torch.utils.data.DataLoader(tokens, batch_size=2)
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_steps=3, logger=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    table = compare_checkpoints(base, tmp_path / "last.ckpt", TARGETS)
    check(table, state(bert()), state(module.model))
    assert list(table["step"].unique()) == [3]


def test_trainer_folders_in_step_order(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=20, num_labels=2, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    data = [{"input_ids": torch.arange(4) + i, "labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=12, save_steps=4, learning_rate=0.01,
        per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model()
    table = compare_checkpoints(tmp_path / "base", tmp_path / "run", TARGETS)
    assert list(table["step"].unique()) == [4, 8, 12]
    by_glob = compare_checkpoints(
        tmp_path / "base", str(tmp_path / "run" / "checkpoint-*"), TARGETS
    )
    assert by_glob.equals(table)
    last = table[table["step"] == 12]
    original = safetensors.torch.load_file(tmp_path / "base/model.safetensors")
    check(last, original, state(model))


def test_a_model_inside_a_larger_one_matches_by_name(tmp_path: Path, base: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = nudge(bert())
            self.classifier = nn.Linear(24, 2)

    torch.save(Classifier().state_dict(), tmp_path / "tuned.pt")
    table = compare_checkpoints(base, tmp_path / "tuned.pt", TARGETS)
    check(table, state(bert()), state(nudge(bert())))
    summary = table.attrs["summary"]["checkpoints"][0]
    assert set(summary["only_in_checkpoint"]) == {"classifier.weight", "classifier.bias"}
    assert "'bert.'" in summary["notes"][0]


def test_an_averaged_copy_beside_the_model_is_not_guessed_at(tmp_path: Path, base: Path) -> None:
    after = state(nudge(bert()))
    both = {f"{who}.{name}": tensor for who in ("model", "ema") for name, tensor in after.items()}
    torch.save(both, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"names twice, behind 'model\.' and 'ema\.'"):
        compare_checkpoints(base, tmp_path / "both.pt", TARGETS)
