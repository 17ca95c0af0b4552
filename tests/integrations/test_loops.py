"""Plain PyTorch loops: Accelerate, accumulation, mixed precision, torch.compile, processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from tests.integrations.loops import adamw, loss_of, same, step_with

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[..., nn.Module]


class TestAccelerate:
    @pytest.fixture
    def accelerator(self) -> Any:
        accelerate = pytest.importorskip("accelerate")
        return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)

    def train(self, accelerator: Any, model: nn.Module, optimizer: Any, batches: int) -> None:
        for step in range(batches):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, step))
                optimizer.step()
                optimizer.zero_grad()

    def test_prepared_optimizer_and_accumulation(
        self, accelerator: Any, tiny_transformer: Build
    ) -> None:
        plain, watched = tiny_transformer().eval(), tiny_transformer().eval()
        recorder = dd.Recorder(watched, ["query"], every=1)
        plain, first = accelerator.prepare(plain, adamw(plain))
        self.train(accelerator, plain, first, 6)
        watched, second = accelerator.prepare(watched, adamw(watched))
        with recorder.attach(second):
            self.train(accelerator, watched, second, 6)
        table = recorder.trajectory
        assert sorted(table["step"].unique()) == [0, 1, 2, 3]
        assert table.query("step == 3")["total_decay"].tolist() == pytest.approx([3e-3] * 2)
        assert same(plain, watched)
        info = recorder._recording.info.hyperparameters
        assert info["optimizer"] == "AdamW"


class TestMixedPrecision:
    @pytest.mark.parametrize("fused", [False, True])
    def test_skipped_step_is_no_step(self, tiny_transformer: Build, fused: bool) -> None:
        """A GradScaler that finds Inf leaves the weights: nothing is counted or recorded.

        A fused optimizer is called all the same, and finds out by itself.
        """
        model = tiny_transformer()
        optimizer = adamw(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        recorder = dd.Recorder(model, ["query"], every=1)
        with recorder.attach(optimizer):
            for step in range(4):
                optimizer.zero_grad()
                scaled: torch.Tensor = scaler.scale(loss_of(model, step))
                torch.autograd.backward(scaled)
                if step == 1:
                    before = {k: v.clone() for k, v in model.state_dict().items()}
                    gradient = next(p.grad for p in model.parameters() if p.grad is not None)
                    gradient.fill_(torch.inf)
                scaler.step(optimizer)
                scaler.update()
                if step == 1:
                    now = model.state_dict()
                    assert all(torch.equal(v, now[k]) for k, v in before.items())
                    assert recorder.step == 1
        table = recorder.trajectory
        assert sorted(table["step"].unique()) == [0, 1, 2, 3]
        assert table.query("step == 3")["total_decay"].tolist() == pytest.approx([3e-3] * 2)


class TestParameterGroups:
    def test_each_weight_has_the_decay_of_its_own_group(self, tiny_transformer: Build) -> None:
        model: Any = tiny_transformer()
        first, second = model.layers
        groups = [
            {"params": first.query.parameters(), "lr": 1e-3, "weight_decay": 0.5},
            {"params": second.query.parameters(), "weight_decay": 0.0},
            {"params": [*first.value.parameters(), *second.value.parameters()]},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        recorder = dd.Recorder(model, ["query", "value", "key"], every=2)
        with recorder.attach(optimizer):
            for step in range(2):
                step_with(model, optimizer, step)
        last = recorder.trajectory.query("step == 2").set_index("site")["total_decay"]
        assert last.to_dict() == pytest.approx(
            {
                "layers.0.query": 1e-3, "layers.0.key": 0.0, "layers.0.value": 2e-3,
                "layers.1.query": 0.0, "layers.1.key": 0.0, "layers.1.value": 2e-3,
            }
        )  # fmt: skip
        assert len(recorder._recording.info.hyperparameters["parameter_groups"]) == 3

    def test_scheduler_and_groups_added_later(self, tiny_transformer: Build) -> None:
        model: Any = tiny_transformer()
        optimizer = torch.optim.AdamW(model.layers[0].parameters(), lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        recorder = dd.Recorder(model, ["query"], every=1)
        with recorder.attach(optimizer):
            step_with(model, optimizer, 0)
            scheduler.step()
            step_with(model, optimizer, 1)
            optimizer.add_param_group({"params": model.layers[1].parameters(), "lr": 1.0})
            step_with(model, optimizer, 2)
        last = recorder.trajectory.query("step == 3").set_index("layer")["total_decay"]
        assert last.tolist() == pytest.approx([1e-3 * (1 + 0.5 + 0.5), 0.1])


class TestCompiled:
    def test_names_and_rows_are_those_of_the_plain_model(self, tiny_transformer: Build) -> None:
        tables = []
        for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
            model: Any = wrap(tiny_transformer().eval())
            optimizer = adamw(model)
            recorder = dd.Recorder(model, ["query", "output"], every=1)
            with recorder.attach(optimizer):
                for step in range(2):
                    step_with(model, optimizer, step)
            tables.append(recorder.trajectory)
        pd.testing.assert_frame_equal(tables[0], tables[1])
        assert tables[0]["site"].iloc[0] == "layers.0.query"

    def test_compiled_after_the_recorder_was_made(self, tiny_transformer: Build) -> None:
        model = tiny_transformer().eval()
        recorder = dd.Recorder(model, ["query"], every=1)
        compiled: Any = torch.compile(model, backend="eager")
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            step_with(compiled, optimizer, 0)
        assert (recorder.trajectory.query("step == 1")["update_norm"] > 0).all()


class TestProcesses:
    def test_only_the_main_process_writes(
        self, tiny_transformer: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        distributed = torch.distributed
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        for rank, writes in ((1, False), (0, True)):
            monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
            model = tiny_transformer()
            recorder = dd.Recorder(
                model, ["query"], every=1, run_dir=tmp_path / f"{rank}", keep=["units", "weights"]
            )
            optimizer = adamw(model)
            with recorder.attach(optimizer):
                step_with(model, optimizer, 0)
            assert (tmp_path / f"{rank}").exists() == writes
            assert recorder.trajectory["step"].tolist() == [0, 0, 1, 1]

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
    def test_distributed_data_parallel(self, tmp_path: Path) -> None:
        """Two processes train one model over gloo; one run directory, rows once."""
        processes: Any = torch.multiprocessing
        processes.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
        table = dd.load_runs(tmp_path / "run")
        assert table["step"].tolist() == [0, 1, 2]
        assert set(table["site"]) == {"query"}
        assert (table.query("step > 0")["update_norm"] > 0).all()
        assert (tmp_path / "identical").exists()


def _train_in_parallel(rank: int, folder: str) -> None:
    from pathlib import Path

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous"
    )
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        inner: Any = nn.ModuleDict({"query": nn.Linear(4, 3)})
        inner.forward = lambda x, inner=inner: inner["query"](x)
        model = nn.parallel.DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = dd.Recorder(
            model, ["query"], every=1, run_dir=f"{folder}/run" if watched else None
        )
        with recorder.attach(optimizer):
            for step in range(2):
                source = torch.Generator().manual_seed(10 * step + rank)
                optimizer.zero_grad()
                torch.autograd.backward(model(torch.randn(5, 4, generator=source)).square().mean())
                optimizer.step()
        results.append(inner["query"].weight.detach().clone())
    if rank == 0 and torch.equal(*results):
        (Path(folder) / "identical").touch()
    torch.distributed.barrier()
    os._exit(0)  # see tests/torchrun.py


class TestCost:
    def test_only_chosen_weights_are_read(
        self, tiny_transformer: Build, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every other weight could be anything, even a tensor without memory."""
        model: Any = tiny_transformer()
        recorder = dd.Recorder(model, ["query"], every=1)
        model.head = nn.Linear(9, 4, device="meta")
        model.layers[0].value = nn.Linear(9, 5, device="meta")
        recorder.record()
        assert len(recorder.trajectory) == 2

    def test_nothing_but_the_table_grows(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        optimizer = adamw(model)
        recorder = dd.Recorder(model, ["query"], every=1)
        sizes = []
        with recorder.attach(optimizer):
            for step in range(6):
                step_with(model, optimizer, step)
                sizes.append(
                    {
                        (type(part).__name__, name): len(value)
                        for part in (recorder, recorder._recording, recorder._watch)
                        for name, value in vars(part).items()
                        if hasattr(value, "__len__")
                    }
                )
        assert sizes[1] == sizes[-1]

    def test_metrics_cost_does_not_grow(self, tiny_transformer: Build) -> None:
        recorder = dd.Recorder(tiny_transformer(), ["query"], every=1)
        recorder.record()
        read: list[int] = []

        class Rows(list[dict[str, object]]):
            def __iter__(self) -> Any:
                for row in super().__iter__():
                    read.append(1)
                    yield row

        for _ in range(100):
            recorder.step += 1
            recorder.record()
        rows = recorder._recording.rows
        rows.latest = Rows(rows.latest)
        assert len(recorder.metrics) > 0
        assert len(read) == 2
