"""Run: `python -m analyses.pretrain --shape bart` (about 4 minutes on one H100).

A second starting point for the study, which nobody has fine-tuned before: how well a small model
learns the source text of the installed Python packages from random weights. It is an
encoder–decoder in BART's shape (6 + 6 layers, as the paper's model) that restores masked spans, or
a decoder in LLaMA's shape (12 layers) that tells the next token. A small encoder–decoder learns to
look into its encoder only if its attention begins far enough from even (weights of 1/√width; with
BART's own, `--initial-std 0.02`, in windows of 256 tokens, it did in one of two runs, that of the
committed results), and sooner in short windows. The loss with nothing but masks in the encoder
tells whether it did. The study takes it by

    python -m analyses.reproduce --model models/bart --data pairs.jsonl

Writes the model and its tokenizer to models/SHAPE (not kept in git), and the loss before and after
on text it has not seen, with all settings, to analyses/results/pretrain_SHAPE.json.
"""

from __future__ import annotations

import argparse
import random
import site
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from analyses._results import write_about
from analyses.finetuning.recipe import Recipe
from analyses.finetuning.training import replayed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

SPECIAL: Final = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
START, PAD, END, _, MASK = range(len(SPECIAL))
SPAN: Final = 3
MASKED: Final = 0.3


@dataclass(frozen=True)
class Settings:
    """What is trained, on how much, and how long.

    Attributes:
        shape: "bart" or "llama".
        width: of the model.
        layers: in all; BART has half of them in each stack.
        vocabulary: tokens of the byte-level BPE.
        megabytes: of source text at most.
        length: tokens of a window.
        batch_size: windows a step.
        steps: optimizer steps of AdamW.
        learning_rate: peak of the linear schedule.
        initial_std: of the initial weights of a BART; 0 for 1/√width.
        seed: of everything.
    """

    shape: str
    width: int = 256
    layers: int = 12
    vocabulary: int = 8192
    megabytes: float = 150.0
    length: int = 64
    batch_size: int = 512
    steps: int = 4000
    learning_rate: float = 5e-4
    initial_std: float = 0.0
    seed: int = 0


def source_files(megabytes: float, seed: int) -> list[str]:
    """Python source text of the standard library and the installed packages, shuffled by file."""
    roots = [Path(sysconfig.get_paths()["stdlib"]), *map(Path, site.getsitepackages())]
    files = sorted(
        {file.resolve() for root in roots if root.exists() for file in root.rglob("*.py")}
    )
    random.Random(seed).shuffle(files)
    texts: list[str] = []
    left = megabytes * 1e6
    for file in files:
        if left <= 0:
            break
        text = file.read_text(encoding="utf-8", errors="ignore") if file.is_file() else ""
        if text:
            texts.append(text[: int(left)])
            left -= len(texts[-1])
    return texts


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE of these texts, as transformers wraps it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(
        texts, vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False
    )
    names = {"bos": START, "pad": PAD, "eos": END, "unk": 3, "mask": MASK}
    tokens = {f"{name}_token": SPECIAL[number] for name, number in names.items()}
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=bpe._tokenizer, **tokens)


def encode(tokenizer: Any, texts: Sequence[str]) -> NDArray[np.uint16]:
    """All texts as one row of tokens, an end token behind each."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
    return np.concatenate([np.array([*found.ids, END], dtype=np.uint16) for found in encoded])


def make_model(settings: Settings) -> nn.Module:
    """A model from random weights, without dropout."""
    from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    width, heads = settings.width, max(1, settings.width // 64)
    tokens: dict[str, Any] = {"bos_token_id": START, "pad_token_id": PAD, "eos_token_id": END}
    tokens |= {"vocab_size": settings.vocabulary, "max_position_embeddings": settings.length}
    if settings.shape == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                intermediate_size=width * 11 // 4,
                num_hidden_layers=settings.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                tie_word_embeddings=True,
                use_cache=False,
                **tokens,
            )
        )
    each: dict[str, Any] = {}
    for stack in ("encoder", "decoder"):
        each |= {f"{stack}_layers": settings.layers // 2, f"{stack}_ffn_dim": 4 * width}
        each |= {f"{stack}_attention_heads": heads}
    return BartForConditionalGeneration(
        BartConfig(
            d_model=width,
            init_std=settings.initial_std or width**-0.5,
            dropout=0.0,
            use_cache=False,
            decoder_start_token_id=END,
            forced_eos_token_id=None,
            **each,
            **tokens,
        )
    )


def noisy(windows: Tensor, generator: torch.Generator) -> Tensor:
    """Windows with about `MASKED` of their tokens replaced by <mask>, in spans of `SPAN`."""
    start = torch.rand(windows.shape, generator=generator) < MASKED / SPAN
    hidden = start.clone()
    for shift in range(1, SPAN):
        hidden[:, shift:] |= start[:, :-shift]
    return windows.masked_fill(hidden, MASK)


def loss_of(model: nn.Module, given: Tensor) -> Tensor:
    """Loss on windows, stacked as (noisy, clean): restore the text, or tell the next token."""
    seen, wanted = given
    with torch.autocast(given.device.type, torch.bfloat16, cache_enabled=False):
        if not model.config.is_encoder_decoder:  # type: ignore[union-attr]
            logits = model(input_ids=wanted).logits[:, :-1]
            wanted = wanted[:, 1:]
        else:
            before = torch.full_like(wanted[:, :1], END)
            shifted = torch.cat([before, wanted[:, :-1]], dim=1)
            logits = model(input_ids=seen, decoder_input_ids=shifted).logits
    loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
    return loss


class Windows:
    """Random windows of the text: training ones, and held-out ones from its last part."""

    def __init__(self, tokens: NDArray[np.uint16], settings: Settings) -> None:
        self._tokens, self._settings = torch.from_numpy(tokens.astype(np.int32)), settings
        self._cut = len(tokens) - max(2 * settings.length, len(tokens) // 100)
        self._generator = torch.Generator().manual_seed(settings.seed)

    def draw(self, *, held_out: bool = False) -> Tensor:
        """Windows for one step, shape (2, batch, length): noisy and clean."""
        length, size = self._settings.length, self._settings.batch_size
        low, high = (self._cut, len(self._tokens)) if held_out else (0, self._cut)
        at = torch.randint(low, high - length + 1, (size, 1), generator=self._generator)
        clean = self._tokens[at + torch.arange(length)].long()
        return torch.stack([noisy(clean, self._generator), clean])


def pretrain(model: nn.Module, windows: Windows, settings: Settings) -> None:
    """AdamW under a linear schedule with warm-up."""
    recipe = Recipe("FT", steps=settings.steps, learning_rate=settings.learning_rate, warmup=0.05)
    first = windows.draw().to(next(model.parameters()).device)
    fused = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=0.01, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(fused, recipe.schedule)

    def eager(given: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, given)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    backward = replayed(eager, model, first) if first.is_cuda else eager
    with tqdm(total=settings.steps, desc=settings.shape, unit="step", disable=None) as bar:
        for step in range(settings.steps):
            loss = backward(windows.draw().to(first.device))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            fused.step()
            scheduler.step()
            bar.update()
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Windows, *, blind: bool = False) -> float:
    """Mean loss of four batches from the part of the text that is not trained on.

    With `blind`, the encoder sees nothing but masks: what the decoder does without it.
    """
    device = next(model.parameters()).device
    losses = []
    for _ in range(4):
        given = windows.draw(held_out=True)
        if blind:
            given[0] = MASK
        losses.append(loss_of(model, given.to(device)))
    return torch.stack(losses).mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-trains, writes the model and what is known of it."""
    parser = argparse.ArgumentParser(
        prog="python -m analyses.pretrain", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--shape", choices=("bart", "llama"), default="bart")
    for name, value in asdict(Settings("")).items():
        if name != "shape":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in")
    options = vars(parser.parse_args(argv))
    out, device = options.pop("out"), options.pop("device")
    settings = Settings(**options)

    texts = source_files(settings.megabytes, settings.seed)
    tokenizer = make_tokenizer(texts[: max(1, len(texts) // 5)], settings.vocabulary)
    tokens = encode(tokenizer, texts)
    print(f"{len(texts)} files, {len(tokens):,} tokens", flush=True)
    windows = Windows(tokens, settings)
    model = make_model(settings).to(device)
    before = held_out_loss(model, windows)
    pretrain(model, windows, settings)
    after = held_out_loss(model, windows)
    losses = {"before": before, "after": after}
    if settings.shape == "bart":
        losses["encoder_blind"] = held_out_loss(model, windows, blind=True)
    losses = {name: round(loss, 4) for name, loss in losses.items()}
    print(f"held-out loss {losses}", flush=True)

    folder = out / "models" / settings.shape
    model.half().save_pretrained(folder, max_shard_size="15MB")  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    about = {
        "settings": asdict(settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "files": len(texts),
        "tokens": len(tokens),
        "held_out_loss": losses,
    }
    write_about(out, f"pretrain_{settings.shape}", about)
    print(f"Wrote {folder} and pretrain_{settings.shape}.json")


if __name__ == "__main__":
    main()
