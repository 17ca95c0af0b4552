"""The task: find the text that belongs to a query among the others, and tell its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from analyses.finetuning.pairs import Pair

_TEMPERATURE: Final = 0.05
_TEXT_TOKENS: Final = 24
_QUERY_TOKENS: Final = 12


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, padded on the right: ids and mask, each of shape (texts, width)."""

    ids: Tensor
    mask: Tensor

    def __getitem__(self, chosen: Tensor | slice) -> Tokens:
        return Tokens(self.ids[chosen], self.mask[chosen])

    def to(self, device: torch.device) -> Tokens:
        """The same on another device."""
        return Tokens(self.ids.to(device), self.mask.to(device))

    def trimmed(self) -> Tokens:
        """Without the columns that are padding in every text; waits for a GPU."""
        width = max(1, int(self.mask.sum(1).max()))
        return Tokens(self.ids[:, :width], self.mask[:, :width])

    def beside(self, other: Tokens) -> Tokens:
        """Both, one below the other, the narrower one padded with masked zeros."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        ids, mask = (
            torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])
            for parts in ((self.ids, other.ids), (self.mask, other.mask))
        )
        return Tokens(ids, mask)


@dataclass(frozen=True)
class Examples:
    """Tokenised pairs: queries and texts, and each pair's label as a number."""

    queries: Tokens
    texts: Tokens
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Examples:
        return Examples(self.queries[chosen], self.texts[chosen], self.labels[chosen])

    def to(self, device: torch.device) -> Examples:
        """The same on another device."""
        return Examples(self.queries.to(device), self.texts.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Task:
    """Tokenised training and held-out examples, and the labels in their order."""

    train: Examples
    held_out: Examples
    labels: tuple[str, ...]

    def to(self, device: torch.device) -> Task:
        """The same on another device."""
        return Task(self.train.to(device), self.held_out.to(device), self.labels)


def make_task(pairs: Sequence[Pair], held_out: int, tokenizer: Any) -> Task:
    """Tokenise pairs once; the first `held_out` of them are kept for the score.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if held_out >= len(pairs):
        raise ValueError(f"of {len(pairs)} pairs, {held_out} cannot be held out: give more pairs.")
    labels = tuple(sorted({pair.label for pair in pairs}))

    def tokens(texts: Sequence[str], width: int) -> Tokens:
        found = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=width,
            return_tensors="pt",
        )
        return Tokens(found["input_ids"], found["attention_mask"])

    def examples(chosen: Sequence[Pair]) -> Examples:
        return Examples(
            tokens([pair.query for pair in chosen], _QUERY_TOKENS),
            tokens([pair.text for pair in chosen], _TEXT_TOKENS),
            torch.tensor([labels.index(pair.label) for pair in chosen]),
        )

    return Task(examples(pairs[held_out:]), examples(pairs[:held_out]), labels)


@dataclass(frozen=True)
class Score:
    """Held-out results, each the share of examples answered right.

    Attributes:
        retrieval: the right text ranks first among all held-out ones, given the query.
        label: the label (of docstrings: the package) is told from the text.
        loss: the training loss on the held-out examples, in batches of 64.
    """

    retrieval: float
    label: float
    loss: float


States = Literal["both", "decoder"]
"""The stacks of an encoder–decoder whose states make the embedding of a text."""


class PairModel(nn.Module):
    """A base model with mean pooling, and a linear head that tells the label.

    Of an encoder–decoder both stacks read the text, and the states of both are added up. With
    those of the decoder alone the encoder is trained as far as the decoder looks into it, which of
    a model that was hardly pre-trained may be not at all.
    """

    def __init__(self, backbone: nn.Module, labels: int, states: States = "both") -> None:
        super().__init__()
        self.backbone = backbone
        self.states: States = states
        self.head = nn.Linear(int(backbone.config.hidden_size), labels)  # type: ignore[union-attr, arg-type]

    def embed(self, tokens: Tokens) -> Tensor:
        """Unit vectors of the texts, shape (texts, width)."""
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        if self.backbone.config.is_encoder_decoder:  # type: ignore[union-attr]
            inputs |= {"decoder_input_ids": tokens.ids, "decoder_attention_mask": tokens.mask}
        else:
            inputs |= {"use_cache": False} if hasattr(self.backbone.config, "use_cache") else {}  # type: ignore[dict-item]
        states = self.backbone(**inputs)
        hidden = states.last_hidden_state
        if self.backbone.config.is_encoder_decoder and self.states == "both":  # type: ignore[union-attr]
            hidden = hidden + states.encoder_last_hidden_state
        mask = tokens.mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(self, batch: Examples) -> Tensor:
        """In-batch contrastive loss, both ways, plus the cross-entropy of the label.

        On a GPU, where small launches cost more than padding, queries and texts go through the
        model together.
        """
        if batch.labels.is_cuda:
            queries, texts = self.embed(batch.queries.beside(batch.texts)).tensor_split(2)
        else:
            queries = self.embed(batch.queries.trimmed())
            texts = self.embed(batch.texts.trimmed())
        return self._loss(queries, texts, batch.labels)

    def _loss(self, queries: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        similarity = queries @ texts.T / _TEMPERATURE
        own = torch.arange(len(labels), device=labels.device)
        contrastive = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
        return contrastive + F.cross_entropy(self.head(texts), labels)

    @torch.no_grad()
    def score(self, examples: Examples) -> Score:
        """Held-out score, in eval mode; the mode is put back."""
        was_training = self.training
        self.eval()
        queries, texts = self.in_chunks(examples.queries), self.in_chunks(examples.texts)
        own = torch.arange(len(examples), device=queries.device)
        right = (queries @ texts.T).argmax(1) == own
        told = self.head(texts).argmax(1) == examples.labels
        size = 64
        losses = [
            self._loss(*(x[at : at + size] for x in (queries, texts, examples.labels)))
            for at in range(0, max(1, len(examples) - size + 1), size)
        ]
        self.train(was_training)
        return Score(
            right.float().mean().item(),
            told.float().mean().item(),
            torch.stack(losses).mean().item(),
        )

    @torch.no_grad()
    def fit_head(self, examples: Examples) -> None:
        """Start the head from a logistic regression on up to 4,000 embeddings as they are now."""
        from sklearn.linear_model import LogisticRegression

        if self.head.out_features < 2:
            return
        self.eval()
        some = slice(0, 4000)
        texts = self.in_chunks(examples.texts[some]).numpy(force=True)
        probe = LogisticRegression(max_iter=300).fit(texts, examples.labels[some].numpy(force=True))
        weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
        if self.head.out_features == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

    @torch.no_grad()
    def in_chunks(self, tokens: Tokens, size: int = 64) -> Tensor:
        """Unit vectors of many texts, a few at a time."""
        return torch.cat(
            [self.embed(tokens[at : at + size].trimmed()) for at in range(0, len(tokens.ids), size)]
        )
