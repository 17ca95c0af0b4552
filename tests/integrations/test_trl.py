"""The callback in TRL's SFTTrainer, which puts the PEFT adapter on the model by itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dora_dynamics as dd

if TYPE_CHECKING:
    from pathlib import Path

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")

import peft  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402

from dora_dynamics.integrations.transformers import RecorderCallback  # noqa: E402

pytestmark = [  # what TRL's own defaults bring about
    pytest.mark.filterwarnings(f"ignore:{message}:FutureWarning")
    for message in ("`gradient_checkpointing.*` is deprecated", "`is_gradient_checkpointing` is")
]
WORDS = [
    "<pad>",
    "<unk>",
    "</s>",
    "a",
    "and",
    "cat",
    "dog",
    "one",
    "ran",
    "saw",
    "small",
    "that",
    "the",
]
TARGETS = ["query", "value"]


def tokenizer() -> Any:
    """One that knows a dozen words, made here."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def trainer(folder: Path, callbacks: list[Any], **peft_settings: Any) -> Any:
    texts = ["a dog saw the cat", "the small one ran", "a cat and a dog ran", "one saw that"] * 4
    arguments = trl.SFTConfig(
        output_dir=str(folder / "out"), max_steps=4, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=2, save_steps=2,
        report_to="none", disable_tqdm=True, use_cpu=True, seed=11, bf16=False, max_length=8,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **peft_settings),
    )


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_sft_with_an_adapter(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = RecorderCallback(TARGETS, every=2, run_dir=tmp_path / "run")
    recorded = trainer(tmp_path, [callback], use_dora=method == "DoRA")
    recorded.train()
    plain = trainer(tmp_path / "plain", [], use_dora=method == "DoRA")
    plain.train()
    for ours, theirs in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    table = dd.load_runs([tmp_path / "run"])
    assert set(table["method"]) == {method}
    assert sorted(set(table["step"])) == [0, 2, 4]
    assert set(table["role"]) == set(TARGETS)
    assert len(table) == 3 * 2 * len(TARGETS)
    start = table.query("step == 0")
    assert start["delta_direction"].abs().max() < 1e-12

    merged = recorded.model.merge_and_unload()
    before = model().state_dict()
    for row in table.query("step == 4").itertuples():
        name = f"{row.site}.weight"
        change = dd.weight_change(before[name], merged.state_dict()[name])
        assert row.delta_magnitude == pytest.approx(change.delta_magnitude, rel=1e-3, abs=1e-7)
        assert row.delta_direction == pytest.approx(change.delta_direction, rel=1e-3)

    assert "dora_dynamics/query/delta_magnitude" in capsys.readouterr().out
    logged = {key for entry in recorded.state.log_history for key in entry}
    assert {f"dora_dynamics/{role}/delta_magnitude" for role in TARGETS} <= logged
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["method"] == method
