"""Real processes over gloo: what sharded weights say is what whole ones say, to 1e-6."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.sharded import ShardingError
from tests.conftest import IS_CAMPAIGN, PATIENCE, without_gpu
from tests.distributed import trainers
from tests.torchrun import torchrun

CASES, ON_TWO = 6, 10
"""How many cases run on any number of processes, and how many more on two alone."""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_sharded_models_are_followed_as_whole_ones() -> None:
    """Two and four processes run the cases of `launch`: see there, and beside it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.launch", "--worlds", "2", "4"],
        env=without_gpu(), capture_output=True, text=True, check=False, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    expected = 2 * CASES + (1 + IS_CAMPAIGN) * ON_TWO + trainers.AVAILABLE
    assert done.stdout.count(": ok, ") == expected, done.stdout


@pytest.mark.campaign
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(not IS_CAMPAIGN, reason="the test above runs the same cases, and forks")
@pytest.mark.parametrize("processes", [2, 4])
def test_by_torchrun(processes: int) -> None:
    done = torchrun(processes, "-m", "tests.distributed.launch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok, ") == CASES + ON_TWO, done.stdout


class TestHiddenWeights:
    """Weights that are not where they seem to be are refused, never read as they look."""

    def test_zero_3(self) -> None:
        """DeepSpeed leaves parameters of no elements, and numbers them."""
        model = nn.ModuleDict({"query": nn.Linear(4, 3), "value": nn.Linear(4, 3)})
        early = dd.Recorder(model, ["query"])
        optimizer = torch.optim.SGD(model.parameters())
        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id, parameter.ds_shape = number, parameter.shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)
        for refused in (
            lambda: dd.Recorder(model, ["query"]),
            lambda: dd.capture_baseline(model, ["query"]),
            lambda: early.start(optimizer),
        ):
            with pytest.raises(ShardingError, match=r"ZeRO-3 .*dora-dynamics compare"):
                refused()

    def test_an_empty_weight_that_nobody_explains(self) -> None:
        """No number is made of it: refused at the beginning, NaN with a warning in training."""
        model = nn.ModuleDict({"query": nn.Linear(4, 3), "value": nn.Linear(4, 3)})
        optimizer = torch.optim.SGD(model.parameters())
        recorder = dd.Recorder(model, ["query", "value"], every=1)
        weight: torch.Tensor = model["query"].weight  # type: ignore[assignment]
        recorder.start(optimizer)
        weight.data = torch.empty(0)
        with pytest.warns(UserWarning, match=r"query has the shape \(0,\) now"):
            optimizer.step()
        recorder.finish()
        empty = recorder.trajectory["update_norm"].isna().tolist()
        assert empty == [False, False, True, False]
        with pytest.raises(ValueError, match=r"shape \(0,\)"):
            dd.Recorder(model, ["query"]).record()

    def test_shards_that_do_not_say_so(self) -> None:
        """Older transformers kept parts of weights as plain tensors under tensor parallelism."""
        model = nn.ModuleDict({"query": nn.Linear(4, 3)})
        model["query"]._hf_tp_plan = "colwise"  # type: ignore[assignment]
        with pytest.raises(ShardingError, match="query holds a part of its weight"):
            dd.Recorder(model, ["query"])
