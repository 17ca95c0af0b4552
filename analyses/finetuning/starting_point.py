"""Where every recipe starts: a pre-trained model, and pairs to fine-tune it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from analyses.finetuning import docstrings, models, pairs
from analyses.finetuning.task import PairModel, States, Task, make_task

if TYPE_CHECKING:
    import argparse

    from analyses.finetuning.pairs import Pair


@dataclass(frozen=True)
class StartingPoint:
    """What is fine-tuned, and on what.

    Attributes:
        pairs: all pairs that were found.
        task: made of them, on the CPU.
        base: the pre-trained model on its device, its head not fitted yet.
    """

    pairs: list[Pair]
    task: Task
    base: PairModel


def add_options(parser: argparse.ArgumentParser, *, examples: int) -> None:
    """The options that say from what to start, on which device, and where to write."""
    parser.add_argument(
        "--model", help="folder or hub name of a base model; default: packaged MiniLM"
    )
    parser.add_argument(
        "--states",
        choices=get_args(States),
        default="both",
        help="stacks of an encoder-decoder that embed a text",
    )
    parser.add_argument(
        "--data",
        help="JSONL of pairs, or a data set's name; default: docstrings of installed packages",
    )
    parser.add_argument("--examples", type=int, default=examples, help="docstrings of each package")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in")


def load(options: argparse.Namespace, held_out: int) -> StartingPoint:
    """As the options say, with so many pairs kept for the score."""
    found = pairs.read(options.data) if options.data else docstrings.collect(options.examples)
    backbone, tokenizer = models.load(options.model)
    task = make_task(found, held_out, tokenizer)
    base = PairModel(backbone, len(task.labels), options.states)
    return StartingPoint(found, task, base.to(options.device))
