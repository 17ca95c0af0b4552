"""Recorders that are made early, resumed, or refused, on models that are sharded."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import dora_dynamics as dd
from dora_dynamics.effective import NoDenseWeightError
from dora_dynamics.runs.directory import RunDirectoryError
from dora_dynamics.sharded import ShardingError
from tests.distributed.recording import (
    HAS_PEFT,
    TARGETS,
    Twin,
    adapted,
    by_fsdp,
    net,
    one_folder,
    optimizer_of,
    step_with,
    table_difference,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def mesh_of(device: str) -> Any:
    return init_device_mesh(device, (dist.get_world_size(),))


def after_a_step(model: Any, recorder: dd.Recorder, twin: Twin) -> float:
    """How far the table of one step is from that of a twin."""
    twin.follow(model, 0)
    optimizer = optimizer_of(model)
    with recorder.attach(optimizer):
        step_with(model, optimizer, 0)
    twin.follow(model, 1)
    return table_difference(recorder.trajectory, twin.recorder.trajectory)


def made_early(device: str) -> float:
    """A recorder made before the model is sharded keeps its own part of W_0 only."""
    worst = 0.0
    for method in ("FT", "LoRA"):
        for given in (False, True):
            model = adapted(net(device), method)
            twin = Twin(model, lambda m: dd.Recorder(m, TARGETS))
            source = dd.capture_baseline(net(device), TARGETS) if given else None
            recorder = dd.Recorder(model, TARGETS, baseline=source)
            by_fsdp(model, mesh_of(device))
            worst = max(worst, after_a_step(model, recorder, twin))
            held = list(recorder._baseline.weights.values())
            assert all(isinstance(weight, DTensor) for weight in held)
    return worst


def loaded_by_the_first(device: str) -> float:
    """Only the first process has the weights, until sharding sends them to all."""
    model = net(device)
    twin = Twin(model, lambda m: dd.Recorder(m, TARGETS))
    right = copy.deepcopy(model)
    if dist.get_rank() > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
    recorder = dd.Recorder(model, TARGETS)
    model.load_state_dict(right.state_dict())
    by_fsdp(model, mesh_of(device))
    return after_a_step(model, recorder, twin)


def resumed(device: str) -> float:
    """Interrupted and resumed: the table of an uninterrupted run, on every process."""

    def start(folder: Any, resume: Any = None) -> tuple[Any, Any, dd.Recorder]:
        model = net(device)
        by_fsdp(model, mesh_of(device))
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=folder, resume=resume)
        return model, optimizer_of(model), recorder

    with one_folder() as folder:
        model, optimizer, whole = start(folder / "whole")
        with whole.attach(optimizer):
            for step in range(4):
                step_with(model, optimizer, step)
        model, optimizer, recorder = start(folder / "run")
        with recorder.attach(optimizer):
            for step in range(2):
                step_with(model, optimizer, step)
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            state = recorder.state_dict()
            step_with(model, optimizer, 2)
        dist.barrier()
        model, optimizer, recorder = start(folder / "run", state)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        with recorder.attach(optimizer):
            for step in range(2, 4):
                step_with(model, optimizer, step)
        dist.barrier()
        pd.testing.assert_frame_equal(dd.load_runs(folder / "run"), recorder.trajectory)
        dist.barrier()
        model.load_state_dict(saved[0])
        refused(
            "not the one that",
            lambda: dd.Recorder(model, TARGETS, run_dir=folder / "run", resume=state),
            RunDirectoryError,
        )
        refused("already holds a run", lambda: start(folder / "run"), RunDirectoryError)
        return table_difference(recorder.trajectory, whole.trajectory)


def refusals(device: str) -> float:
    """What cannot be followed is refused by one sentence, on every process alike."""
    for original in (False, True):
        model = net(device, keys=4)
        early = dd.Recorder(model, TARGETS)
        inside = FullyShardedDataParallel(
            model, use_orig_params=original, device_id=torch.device(device)
        )
        optimizer = optimizer_of(inside)
        for late in (model, inside):
            refused("FSDP1", partial(dd.Recorder, late, TARGETS))
        refused("FSDP1", partial(early.start, optimizer))
    model = net(device)
    with one_folder() as folder:
        early = dd.Recorder(model, TARGETS, run_dir=folder / "early", keep="weights")
        by_fsdp(model, mesh_of(device))
        optimizer = optimizer_of(model)
        refused("keep='weights'", lambda: early.start(optimizer))
        refused(
            "keep='weights'",
            lambda: dd.Recorder(model, TARGETS, run_dir=folder / "late", keep="weights"),
        )
        dist.barrier()
        assert not (folder / "late").exists()
    some = dd.Recorder(net(device), ["query"] if dist.get_rank() else ["value"])
    by_fsdp(some._model, mesh_of(device))
    if dist.get_world_size() > 1:
        refused("follow different weights", lambda: some.start(optimizer_of(some._model)))
    if HAS_PEFT:
        from peft import OFTConfig, get_peft_model

        plain: Any = net(device)
        tuned = get_peft_model(plain, OFTConfig(target_modules=["value"], oft_block_size=2))
        by_fsdp(tuned, mesh_of(device))
        recorder = dd.Recorder(tuned, ["value"])
        optimizer = optimizer_of(tuned)
        refused("is sharded", lambda: recorder.start(optimizer), NoDenseWeightError)
    return 0.0


def refused(
    message: str, action: Callable[[], object], kind: type[Exception] = ShardingError
) -> None:
    """See that an action is refused in one sentence."""
    said = ""
    try:
        action()
    except kind as error:
        said = str(error)
    assert re.search(message, said), f"{message!r} is not in {said!r}"
    assert "\n" not in said
