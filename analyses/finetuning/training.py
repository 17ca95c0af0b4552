"""Train a `PairModel` by full fine-tuning, LoRA or DoRA while a recorder watches."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import dora_dynamics as dd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from analyses.finetuning.recipe import DecayOn, Recipe
    from analyses.finetuning.task import Examples, PairModel, Score, Task

RECORDS = 20


def adapt(model: PairModel, recipe: Recipe) -> None:
    """Prepare the model for a method: all weights train in FT, adapters and the head otherwise.

    Raises:
        ValueError: the method is none of FT, LoRA and DoRA.
    """
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    options: Any = {"rank": recipe.rank, "alpha": recipe.rank, "generator": generator}
    if recipe.method == "LoRA":
        dd.apply_lora(model.backbone, recipe.roles, **options)
    elif recipe.method == "DoRA":
        dd.apply_dora(model.backbone, recipe.roles, **options)
    elif recipe.method != "FT":
        raise ValueError(f"{recipe.method} is none of FT, LoRA and DoRA.")
    model.head.requires_grad_(True)


def decays(name: str, parameter: nn.Parameter, decay_on: DecayOn) -> bool:
    """Whether weight decay reaches a parameter, as in the paper's code or a part of that.

    That decays every trained parameter, DoRA's m included, but biases and norms; the head, which
    is not what is studied, is left out too.
    """
    if name.startswith("head.") or decay_on == "none":
        return False
    is_magnitude, is_factor = "magnitude" in name, "lora_A" in name or "lora_B" in name
    if decay_on == "magnitude":
        return is_magnitude
    if decay_on == "factors":
        return is_factor
    return is_magnitude or is_factor or parameter.ndim > 1


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, its decay on what `decays` says."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[decays(name, parameter, recipe.decay_on)].append(parameter)
    decay = 0.0 if recipe.optimizer == "adam" else recipe.weight_decay
    settings: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay if decayed else 0.0}
        for decayed, parameters in groups.items()
        if parameters
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=recipe.learning_rate, momentum=0.9, fused=True)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(settings, lr=recipe.learning_rate, fused=True)


@dataclass(frozen=True)
class Tuned:
    """What a run gave: its held-out score, and how many numbers were trained, the head aside."""

    score: Score
    trained_parameters: int


def fine_tune(
    base: PairModel,
    task: Task,
    recipe: Recipe,
    seed: int,
    run_dir: Path,
    *,
    adapt: Callable[[PairModel, Recipe], None] = adapt,
    follow: tuple[str, ...] | None = None,
    capture: bool = False,
    graph: bool = True,
    **recording: Any,
) -> Tuned:
    """Train a copy of the base model one way, recorded in `run_dir`; returns its held-out score.

    Args:
        base: the model to start from, left as it is.
        task: what to train on.
        recipe: how.
        seed: of the adapters' start and of the order of the examples.
        run_dir: folder of the run; one that is there is replaced.
        adapt: prepares the model for the recipe's method.
        follow: what to record where that is not the recipe's roles.
        capture: take W_0 before the method may rewrite it.
        graph: replay a captured graph on a GPU; no for methods that wait for it in their forward.
        recording: further arguments of the `Recorder`.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if capture:
        recording["baseline"] = dd.capture_baseline(model, follow or recipe.roles)
    adapt(model, recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained -= sum(p.numel() for p in model.head.parameters())
    recorder = dd.Recorder(
        model,
        follow or recipe.roles,
        run_dir=run_dir,
        method=recipe.method,
        seed=seed,
        hyperparameters={"recipe": asdict(recipe), "trained_parameters": trained},
        overwrite=True,
        **{"every": max(1, recipe.steps // RECORDS)} | recording,
    )
    train(model, task, recipe, recorder, seed, graph=graph)
    return Tuned(model.score(task.held_out), trained)


def train(
    model: PairModel,
    task: Task,
    recipe: Recipe,
    recorder: dd.Recorder,
    seed: int,
    *,
    graph: bool = True,
) -> None:
    """Train with a linear schedule and warm-up while `recorder` watches."""
    optimizer = make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.schedule)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    order = order_of(len(task.train), recipe, seed).to(task.train.labels.device)
    model.train()
    backward = gradients(model, task.train, order[0], graph=graph)
    with (
        recorder.attach(optimizer),
        tqdm(total=recipe.steps, desc=f"{recipe.method:>5}", unit="step", disable=None) as bar,
    ):
        for step in range(recipe.steps):
            loss = backward(order[step])
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            scheduler.step()
            if not bar.disable:
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def order_of(examples: int, recipe: Recipe, seed: int) -> Tensor:
    """Which examples each step sees, shape (steps, batch size); no batch holds one twice."""
    order = np.random.default_rng(seed)
    batches = [
        order.choice(examples, recipe.batch_size, replace=False) for _ in range(recipe.steps)
    ]
    return torch.from_numpy(np.stack(batches))


def gradients(
    model: PairModel, examples: Examples, chosen: Tensor, *, graph: bool = True
) -> Callable[[Tensor], Tensor]:
    """A function that sets the gradients of the loss on some examples, and returns the loss.

    On a GPU it replays one captured graph, since a small model's hundreds of launches would take
    longer than their work.
    """

    def eager(indices: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model.loss(examples[indices])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return replayed(eager, model, chosen) if chosen.is_cuda and graph else eager


def replayed(
    work: Callable[[Tensor], Tensor], model: nn.Module, example: Tensor
) -> Callable[[Tensor], Tensor]:
    """`work`, which sets the gradients of `model`, as a replay of one CUDA graph.

    Args:
        work: from an input to a loss; must not wait for the GPU.
        model: whose gradients are set; they stay at one place in memory from now on.
        example: an input; all others have its shape.
    """
    given = example.clone()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work(given)
    torch.cuda.current_stream().wait_stream(aside)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = work(given)

    def replay(indices: Tensor) -> Tensor:
        given.copy_(indices)
        graph.replay()
        return loss

    return replay
