"""Small models and a training loop that the tests share."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

IS_CAMPAIGN = os.environ.get("DORA_DYNAMICS_CAMPAIGN") == "full"


def campaign(small: int, full: int) -> int:
    """How often a test of many tries does it: `make campaign` runs them in full."""
    return full if IS_CAMPAIGN else small


PATIENCE = 1200
"""Seconds that tests wait for other processes: none needs them, unless the machine is overloaded
or something hangs."""


def without_gpu() -> dict[str, str]:
    """The environment of a process that forks: neither CUDA nor autograd's threads survive it."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class TinyBlock(nn.Module):
    """Attention whose projections are all non-square, with a residual and dropout."""

    def __init__(self, width: int = 9, keys: int = 6, values: int = 5) -> None:
        super().__init__()
        self.query = nn.Linear(width, keys)
        self.key = nn.Linear(width, keys, bias=False)
        self.value = nn.Linear(width, values)
        self.out_proj = nn.Linear(values, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        mixed = self.dropout(scores.softmax(-1)) @ self.value(x)
        result: torch.Tensor = x + self.dropout(self.out_proj(mixed).tanh())
        return result


class TinyTransformer(nn.Module):
    """Two blocks over an embedding, and a head for four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 9)
        self.layers = nn.ModuleList([TinyBlock(), TinyBlock()])
        self.head = nn.Linear(9, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def seed_everything() -> Callable[[int], None]:
    def seed(value: int) -> None:
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)

    return seed


@pytest.fixture
def tiny_transformer() -> Callable[..., TinyTransformer]:
    """Builds a TinyTransformer; the same seed gives the same weights."""

    def build(seed: int = 0) -> TinyTransformer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TinyTransformer()

    return build


@pytest.fixture
def train() -> Callable[..., list[float]]:
    """Trains a classifier of tokens for some steps and returns its losses."""

    def run(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        seed: int = 0,
        after_step: Callable[[int], object] = lambda step: None,
    ) -> list[float]:
        source = torch.Generator().manual_seed(seed)
        where = next(model.parameters()).device
        losses = []
        for step in range(1, steps + 1):
            tokens = torch.randint(11, (8, 7), generator=source).to(where)
            labels = torch.randint(4, (8,), generator=source).to(where)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), labels)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            after_step(step)
        return losses

    return run


@pytest.fixture
def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.BertModel(config)
    return model


@pytest.fixture
def tiny_gpt2() -> Callable[[], Any]:
    """Builds a GPT-2, whose Conv1D stores (in, out); always the same weights, no dropout."""
    transformers = pytest.importorskip("transformers")

    def build() -> Any:
        config = transformers.GPT2Config(
            vocab_size=30,
            n_embd=12,
            n_layer=2,
            n_head=3,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.GPT2LMHeadModel(config)

    return build
