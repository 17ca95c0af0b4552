"""A tiny pre-trained model and data, so that every recipe of the study runs in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from analyses.finetuning import pairs
from analyses.finetuning.pairs import Pair

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ["walk", "over", "hill", "tree", "gate", "river", "stone", "cloud", "moss", "bird"]


@pytest.fixture(scope="session")
def some_pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(len(WORDS), (40, 7), generator=generator)
    return [
        Pair(" ".join(WORDS[i] for i in row[:2]), " ".join(WORDS[i] for i in row), "ab"[n % 2])
        for n, row in enumerate(drawn)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="session")
def small(
    tmp_path_factory: pytest.TempPathFactory, some_pairs: list[Pair], tokenizer: Any
) -> list[str]:
    """Options that make a recipe small: an encoder of four layers, 30 pairs to train on."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("study")
    BertModel(
        BertConfig(
            vocab_size=12,
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=4,
        )
    ).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pairs.write(some_pairs, folder / "pairs.jsonl")
    return [
        *("--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl")),
        *("--device", "cpu", "--steps", "8", "--batch-size", "6"),
    ]
