"""The training a recorder watches is the training without it, to the last bit."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from tests.recording.training import METHODS, TARGETS, adamw, adapt, assert_same, recorded_steps

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


@pytest.mark.parametrize("method", METHODS)
class TestBitIdentical:
    """Dropout is on, so a draw of random numbers too many or too few shows in the losses."""

    def trained(
        self,
        method: str,
        tiny_transformer: Build,
        train: Train,
        seed_everything: Callable[[int], None],
        device: str,
        watch: Callable[[nn.Module], dd.Recorder] | None,
    ) -> dict[str, Any]:
        model = adapt(tiny_transformer().to(device), method)
        seed_everything(7)
        recorder = watch(model) if watch else None
        optimizer = adamw(model)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)

        def step(_: int) -> None:
            scheduler.step()
            random.random()
            np.random.random()

        if recorder is None:
            losses = train(model, optimizer, 9, after_step=step)
        else:
            with recorder.attach(optimizer):
                losses = train(model, optimizer, 9, after_step=step)
            assert recorded_steps(recorder) == list(range(10))
            assert recorder.trajectory.query("step == 9")["delta_direction"].min() > 0
        return {
            "losses": losses,
            "model": model.state_dict(),
            "grads": [p.grad for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": np.random.get_state(legacy=False),
            "python": random.getstate(),
        }

    @pytest.mark.parametrize("axis", ["output", "input"])
    def test_with_and_without(
        self,
        method: str,
        axis: Any,
        tiny_transformer: Build,
        train: Train,
        seed_everything: Callable[[int], None],
        device: str,
        tmp_path: Path,
    ) -> None:
        def watch(model: nn.Module) -> dd.Recorder:
            return dd.Recorder(
                model, TARGETS, every=1, run_dir=tmp_path, axis=axis, keep=["units", "weights"]
            )

        arguments = (method, tiny_transformer, train, seed_everything, device)
        plain, watched = self.trained(*arguments, None), self.trained(*arguments, watch)
        assert_same(plain, watched)
