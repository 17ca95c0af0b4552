"""How much Python a step costs: function calls are counted, of a recorded step and of another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from tests.robustness.test_soak import calls_in

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = ["query", "value"]
BLOCKS = {"few": 4, "many": 24}


def trained(method: str, blocks: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of two layers a block, its gradients set, and AdamW."""
    layers = {
        f"layers_{i}": nn.ModuleDict({target: nn.Linear(6, 5) for target in TARGETS})
        for i in range(blocks)
    }
    model: nn.Module = nn.ModuleDict(layers)
    if method == "PEFT":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=TARGETS)
        model = peft.get_peft_model(nn.Sequential(model), config)
    elif method != "FT":
        (dd.apply_dora if method == "DoRA" else dd.apply_lora)(model, TARGETS, rank=2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return model, torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def calls(method: str, blocks: int, folder: Path) -> tuple[int, int]:
    """Functions called in the recorder's hooks at a recorded step, and at one that is not."""
    model, optimizer = trained(method, blocks)
    recorded = (4, 5)
    recorder = dd.Recorder(model, TARGETS, every=recorded, run_dir=folder)
    before = set(optimizer._optimizer_step_post_hooks)
    found = []
    with recorder.attach(optimizer):
        (post,) = set(optimizer._optimizer_step_post_hooks) - before
        pre = list(optimizer._optimizer_step_pre_hooks)
        assert len(pre) == (method != "FT")  # which has no frozen weight that could begin to train

        def hooks() -> None:
            for hook in pre:
                optimizer._optimizer_step_pre_hooks[hook](optimizer, (), {})
            optimizer._optimizer_step_post_hooks[post](optimizer, (), {})

        for _ in range(8):
            found.append(calls_in(hooks))
    assert sorted(recorder.trajectory["step"].unique()) == [0, *recorded, 8]
    return found[4], found[7]


@pytest.mark.parametrize(
    ("method", "most"), [("FT", 200), ("LoRA", 260), ("DoRA", 270), ("PEFT", 470)]
)
def test_work_a_weight_is_bounded(method: str, most: int, tmp_path: Path) -> None:
    """A recorded step: so many calls a weight. Any other: none, however many there are."""
    few, many = (calls(method, blocks, tmp_path / name) for name, blocks in BLOCKS.items())
    sites = 2 * (BLOCKS["many"] - BLOCKS["few"])
    a_site = (many[0] - few[0]) / sites
    assert a_site <= most
    assert many[1] == few[1] <= 80
