"""Recorders on sharded models that train, against recorders on the same weights whole."""

from __future__ import annotations

import copy
import functools
import importlib.util
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import dora_dynamics as dd
from dora_dynamics.recording.rows import RecordedRows
from dora_dynamics.recording.troubles import Troubles
from dora_dynamics.trajectory import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TARGETS = ["query", "value", "out_proj"]
LR, DECAY = 1e-2, 0.1
HAS_PEFT = importlib.util.find_spec("peft") is not None


class Block(nn.Module):
    """Projections whose rows do not divide by the number of processes; one has one row."""

    def __init__(self, width: int, keys: int, values: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, keys)
        self.value = nn.Linear(width, values)
        self.out_proj = nn.Linear(values, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.query(x).sigmoid().mean(-1, keepdim=True)
        result: torch.Tensor = x + self.out_proj(self.value(gate * x).tanh())
        return result


class Net(nn.Module):
    """Two blocks."""

    def __init__(self, keys: int = 1, values: int = 7) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(12, keys, values), Block(12, keys, values)])
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)
        return result


def net(device: str, dtype: torch.dtype | None = None, **sizes: int) -> Net:
    """The same weights on every process; in float64 on a GPU, which tiles a shard otherwise."""
    dtype = dtype or (torch.float64 if device == "cuda" else torch.float32)
    torch.manual_seed(0)
    return Net(**sizes).to(device, dtype)


def adapted(model: nn.Module, method: str) -> nn.Module:
    """The model with an adapter, whose factors are not at their start."""
    if method in ("LoRA", "DoRA"):
        (dd.apply_lora if method == "LoRA" else dd.apply_dora)(model, TARGETS, rank=3)
    elif method != "FT":
        from peft import LoraConfig, get_peft_model

        start: Any = "pissa" if "PiSSA" in method else True
        dtype = next(model.parameters()).dtype
        model = get_peft_model(
            model.to(torch.float32),  # PiSSA begins in no other precision
            LoraConfig(
                target_modules=TARGETS, r=3, use_dora="DoRA" in method, init_lora_weights=start
            ),
        ).to(dtype)
    source = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "PiSSA" not in method:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=source).to(parameter)
    return model


def by_fsdp(model: nn.Module, mesh: Any) -> None:
    """Each block a group of its own, and the rest."""
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_tp(model: nn.Module, mesh: Any) -> None:
    """Columns, then rows."""
    plan = {"layers.*.value": ColwiseParallel(), "layers.*.out_proj": RowwiseParallel()}
    parallelize_module(model, mesh, plan)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY, foreach=False)


def step_with(model: nn.Module, optimizer: Any, step: int, *, alike: bool = False) -> float:
    """One step; each process has data of its own, or all the same."""
    rank = 0 if alike else dist.get_rank()
    source = torch.Generator().manual_seed(100 * step + rank)
    like = next(model.parameters())
    x = torch.randn(6, 12, generator=source).to(like.device, like.dtype)
    optimizer.zero_grad()
    loss = model(x).square().mean()
    torch.autograd.backward(loss)
    optimizer.step()
    return float(loss)


class Twin:
    """The same model whole, on every process, that follows the weights of the sharded one."""

    def __init__(self, model: nn.Module, recorder: Callable[[nn.Module], dd.Recorder]) -> None:
        self.model = copy.deepcopy(model)
        self.recorder = recorder(self.model)

    def follow(self, sharded: nn.Module, step: int) -> None:
        """Take over the weights and record them."""
        with torch.no_grad():
            pairs = zip(self.model.parameters(), sharded.parameters(), strict=True)
            for mine, its in pairs:
                mine.copy_(its.full_tensor() if isinstance(its, DTensor) else its)
        if self.recorder.last_recorded is None:
            self.recorder._baseline.settle(self.recorder._followed)
        self.recorder.step = step
        self.recorder.record()


def table_difference(found: pd.DataFrame, expected: pd.DataFrame) -> float:
    """The largest relative difference of two tables, but for the run's name and Λ."""
    assert len(found) == len(expected) > 0
    worst = 0.0
    for column in COLUMNS:
        a, b = found[column.name], expected[column.name]
        if column.kind == "text" and column.name not in ("run", "method"):
            assert a.tolist() == b.tolist(), column.name
        if column.kind == "text" or column.name == "total_decay":
            continue
        x, y = (pd.to_numeric(v).to_numpy(dtype=np.float64, na_value=np.nan) for v in (a, b))
        assert np.array_equal(np.isnan(x), np.isnan(y)), column.name
        # a coupling of 0 is as good as one of 1e-12
        scale = np.maximum(np.abs(y), 1e-3 if "coupling" in column.name else 1e-12)
        worst = max(worst, float(np.nan_to_num(np.abs(x - y) / scale).max()))
    return worst


@contextmanager
def one_folder() -> Iterator[Path]:
    """A folder that all processes know."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names, src=0)
    try:
        yield Path(names[0])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(names[0])


def largest_collective(recorder: dd.Recorder) -> tuple[int, int]:
    """Collectives of one record, and the bytes in all of them together."""
    counted = []
    original = dist.all_reduce

    @functools.wraps(original)
    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    _ = recorder.trajectory  # on a GPU rows come a moment later: this waits for them
    recording = recorder._recording
    recording.last = -1
    rows, recording.rows = recording.rows, RecordedRows(Troubles(are_fatal=True))
    try:
        with CommDebugMode() as traffic:
            recorder.record()
        _ = recorder.trajectory
    finally:
        dist.all_reduce = original
    recording.rows = rows
    assert traffic.get_total_counts() == len(counted), traffic.get_comm_counts()
    return len(counted), sum(counted)


def trained(
    device: str, method: str, shard: Callable[[nn.Module], None], *, alike: bool = False,
    **sizes: Any,
) -> float:  # fmt: skip
    """Trains sharded and recorded, beside a twin; checks collectives, files and the training."""
    plain = adapted(net(device, **sizes), method)
    whole: dict[str, Any] = {}
    if "PiSSA" in method:
        whole["baseline"] = dd.capture_baseline(net(device, **sizes), TARGETS)
    options: dict[str, Any] = {"every": 2, **whole}
    twin = Twin(plain, lambda m: dd.Recorder(m, TARGETS, **options))
    losses: list[list[float]] = []
    with one_folder() as folder:
        if method == "FT":
            model = copy.deepcopy(plain)
            shard(model)
            optimizer = optimizer_of(model)
            losses.append([step_with(model, optimizer, step, alike=alike) for step in range(4)])
        model = copy.deepcopy(plain)
        shard(model)
        optimizer = optimizer_of(model)
        recorder = dd.Recorder(model, TARGETS, run_dir=folder / "run", keep=["units"], **options)
        twin.follow(model, 0)
        with recorder.attach(optimizer):
            seen = []
            for step in range(4):
                seen.append(step_with(model, optimizer, step, alike=alike))
                if step % 2:
                    twin.follow(model, step + 1)
            with torch.no_grad():  # an evaluation leaves the root of FSDP gathered
                model(torch.zeros(2, 12, device=device, dtype=next(plain.parameters()).dtype))
        assert all(seen == unwatched for unwatched in losses)
        count, size = largest_collective(recorder)
        units = sum(recorder.trajectory.query("step == 4")["units"])
        weights = sum(p.numel() for n, p in plain.named_parameters() if "lora_A" in n)
        weights += sum(p.numel() for n, p in plain.named_parameters() if "magnitude" in n)
        assert count <= (1 if method == "FT" else 2) + alike + ("PiSSA" in method), count
        assert size <= 8 * (5 * units + 40 + 4 * alike * units) + 8 * weights + 64 * 12, size
        dist.barrier()
        worst = table_difference(recorder.trajectory, twin.recorder.trajectory)
        table = dd.load_runs(folder / "run")
        pd.testing.assert_frame_equal(table, recorder.trajectory)
        assert sorted(p.name for p in (folder / "run" / "units").iterdir()) == [
            f"step-{step}.safetensors" for step in (0, 2, 4)
        ]
    last = recorder.trajectory.query("step == 4")
    expected = {"FT": 4 * LR * DECAY, "DoRA": 4 * LR * DECAY, "LoRA": 0.0}[method.split()[-1]]
    if "PiSSA" not in method:
        np.testing.assert_allclose(last["total_decay"], expected, rtol=1e-9)
    return worst


def fsdp(device: str) -> float:
    """FSDP2 over all processes: full fine-tuning, our adapters and PEFT's."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    methods = ["FT", "LoRA", "DoRA"]
    if HAS_PEFT:
        methods += ["PEFT LoRA", "PEFT DoRA", "PiSSA PEFT DoRA"][2 * (mesh.size() > 2) :]
    return max(trained(device, method, lambda m: by_fsdp(m, mesh)) for method in methods)


def tensor_parallel(device: str) -> float:
    """Tensor parallelism: units whole on a process, and split over all."""
    world = dist.get_world_size()
    mesh = init_device_mesh(device, (world,))
    return trained(
        device, "FT", lambda m: by_tp(m, mesh), alike=True, values=2 * world, dtype=torch.float64
    )


def two_dimensions(device: str) -> float:
    """FSDP with tensor parallelism, where one copies what the other does not shard."""
    world = dist.get_world_size()
    if world < 2:
        return 0.0
    mesh = init_device_mesh(device, (world // 2, 2), mesh_dim_names=("dp", "tp"))

    def shard(model: nn.Module) -> None:
        by_tp(model, mesh["tp"])
        by_fsdp(model, mesh["dp"])

    return trained(device, "FT", shard, alike=True, values=8, dtype=torch.float64)


def hybrid(device: str) -> float:
    """Copies of shards: FSDP's hybrid mesh."""
    world = dist.get_world_size()
    if world < 2:
        return 0.0
    mesh = init_device_mesh(device, (2, world // 2), mesh_dim_names=("copies", "shards"))
    return trained(device, "FT", lambda m: by_fsdp(m, mesh))
