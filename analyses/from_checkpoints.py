"""Run: `python -m analyses.from_checkpoints` (minutes on 2 cores; extras `demo` and `hf`).

What most people have: a folder of checkpoints of full fine-tuning and folders of PEFT adapters.
Fine-tunes the packaged MiniLM a little, by full fine-tuning, LoRA and DoRA (PEFT's own), with the
paper's total decay, and saves `checkpoint-N` folders below runs/from_checkpoints/; from there on
only the command line is used, as it is printed, to draw figures/from_checkpoints.{png,svg} from
the files. So few steps demonstrate the command; for the finding see `analyses.reproduce`.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from analyses.finetuning import docstrings, models
from analyses.finetuning.recipe import LEARNING_RATES, METHODS, PAPER_TOTAL_DECAY, Recipe
from analyses.finetuning.task import PairModel, Task, make_task
from analyses.finetuning.training import gradients, make_optimizer, order_of

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 0


def adapted(model: PairModel, recipe: Recipe) -> PairModel:
    """A copy of the model, with PEFT's adapters on it where the method has adapters."""
    model = copy.deepcopy(model).requires_grad_(True)
    if recipe.method != "FT":
        import peft

        config = peft.LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.rank,
            target_modules=list(recipe.roles),
            use_dora=recipe.method == "DoRA",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, about a name that PEFT uses
            model.backbone = peft.get_peft_model(model.backbone, config)
    return model


def fine_tune(base: PairModel, task: Task, recipe: Recipe, saves: int, folder: Path) -> None:
    """Train a copy of `base`, and save `saves` checkpoints of it as transformers and PEFT do."""
    torch.manual_seed(SEED)
    model = adapted(base, recipe)
    optimizer = make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.schedule)
    order = order_of(len(task.train), recipe, SEED)
    backward = gradients(model, task.train, order[0])
    for step in range(1, recipe.steps + 1):
        backward(order[step - 1])
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        scheduler.step()
        if step % max(1, recipe.steps // saves) == 0:
            saved: Any = model.backbone
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of PEFT, about the base's configuration
                saved.save_pretrained(folder / f"checkpoint-{step}")


def run(*arguments: object) -> None:
    """Run `dora-dynamics` with these arguments, as a person would."""
    words = [str(argument) for argument in arguments]
    print("$ dora-dynamics", *words, flush=True)
    subprocess.run([sys.executable, "-m", "dora_dynamics", *words], check=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes and saves, then compares and draws from the command line."""
    parser = argparse.ArgumentParser(prog="python -m analyses.from_checkpoints")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--saves", type=int, default=4, help="checkpoints of each method")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--examples", type=int, default=50, help="docstrings of each package")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in (default: .)")
    parser.add_argument("--redraw", action="store_true", help="use the checkpoints of last time")
    options = parser.parse_args(argv)
    folder = options.out / "runs" / "from_checkpoints"
    if not options.redraw:
        encoder, tokenizer = models.load(None)
        task = make_task(docstrings.collect(options.examples), 1, tokenizer)
        base = PairModel(encoder, len(task.labels))
        base.fit_head(task.train)
        for method in METHODS:
            recipe = Recipe(method, options.steps, options.batch_size, LEARNING_RATES[method])
            recipe = replace(recipe, total_decay=PAPER_TOTAL_DECAY[method])
            fine_tune(base, task, recipe, options.saves, folder / "saved" / method)
    for method in METHODS:
        run("compare", models.default_model(), folder / "saved" / method,
            "--targets", "query,value", "--out", folder / method, "--overwrite")  # fmt: skip
    (options.out / "figures").mkdir(exist_ok=True)
    for ending in ("png", "svg"):
        figure = options.out / "figures" / f"from_checkpoints.{ending}"
        run("plot", *(folder / method for method in METHODS), "--out", figure)


if __name__ == "__main__":
    main()
