"""What goes on around a recorder: threads, workers, graphs, compilers. Training is the same."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dora_dynamics as dd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STEPS = 6
Run = tuple[list[float], pd.DataFrame]


class Small(nn.Module):
    """Two projections, and nothing random."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.value(self.query(x).tanh())
        return out


def model_of(method: str) -> Small:
    torch.manual_seed(0)
    model = Small()
    if method != "FT":
        apply = dd.apply_lora if method == "LoRA" else dd.apply_dora
        apply(model, ["query", "value"], rank=2, generator=torch.Generator().manual_seed(1))
    return model


def batches(workers: int = 0) -> DataLoader[tuple[torch.Tensor, ...]]:
    source = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(4 * STEPS, 7, generator=source))
    return DataLoader(data, batch_size=4, num_workers=workers)


def trained(
    model: nn.Module,
    call: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    workers: int = 0,
    run_dir: Path | None = None,
    watch: bool = True,
) -> Run:
    """The losses of some steps, and the table of what was recorded at each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    recorder = dd.Recorder(model, ["query", "value"], every=1, run="r", run_dir=run_dir)
    losses = []
    if watch:
        recorder.start(optimizer)
    for (x,) in batches(workers):
        optimizer.zero_grad()
        loss = (model if call is None else call)(x).square().sum()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    if watch:
        recorder.finish()
    return losses, recorder.trajectory


def assert_same(found: Run, expected: Run) -> None:
    assert found[0] == expected[0]
    pd.testing.assert_frame_equal(found[1], expected[1], check_exact=True)


@contextmanager
def beside(action: Callable[[], object]) -> Iterator[list[int]]:
    """Do something over and over in another thread; what is given counts how often."""
    over, raised, count = threading.Event(), [], [0]

    def work() -> None:
        try:
            while not over.is_set():
                action()
                count[0] += 1
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield count
    finally:
        while not count[0] and not raised:
            over.wait(0.001)
        over.set()
        thread.join()
    assert not raised, raised


@pytest.mark.parametrize("method", ["FT", "DoRA"])
def test_workers_of_a_dataloader(method: str, tmp_path: Path) -> None:
    """Processes that are forked while the recorder holds its files, and end before it."""
    plain = trained(model_of(method), watch=False)
    expected = trained(model_of(method))
    assert plain[0] == expected[0]
    assert len(expected[1]) == 2 * (STEPS + 1)
    found = trained(model_of(method), workers=1, run_dir=tmp_path / "r")
    assert_same(found, expected)
    pd.testing.assert_frame_equal(dd.load_runs(tmp_path / "r"), expected[1], check_exact=True)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "run.json", "trajectory.csv",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["FT", "LoRA", "DoRA"])
def test_a_thread_that_calls_the_model(method: str) -> None:
    expected = trained(model_of(method))
    model, x = model_of(method), torch.ones(3, 7)

    def evaluate() -> None:
        with torch.no_grad():
            assert model(x).isfinite().all()

    with beside(evaluate) as calls:
        assert_same(trained(model), expected)
    assert calls[0] > 0


def test_a_thread_that_reads_the_table(tmp_path: Path) -> None:
    """A page that shows the run while it is recorded: whole steps, never less than before."""
    expected = trained(model_of("FT"))
    model = model_of("FT")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = dd.Recorder(model, ["query", "value"], every=1, run="r", run_dir=tmp_path / "r")
    seen = [0]

    def read() -> None:
        for table in (recorder.trajectory, dd.load_runs(tmp_path / "r")):
            assert len(table) >= seen[-1] - 2
            assert len(table) % 2 == 0
            pd.testing.assert_frame_equal(table, expected[1].head(len(table)), check_exact=True)
            seen.append(len(table))

    with beside(read), recorder.attach(optimizer):
        for (x,) in batches():
            optimizer.zero_grad()
            torch.autograd.backward(model(x).square().sum())
            optimizer.step()
    pd.testing.assert_frame_equal(recorder.trajectory, expected[1], check_exact=True)


@pytest.mark.parametrize("method", ["FT", "LoRA", "DoRA"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(method: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def call(x: torch.Tensor) -> torch.Tensor:
        out: Any = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
        return torch.as_tensor(out)

    expected = trained(model_of(method))
    model = model_of(method)
    assert_same(trained(model, call), expected)


@pytest.mark.parametrize(("method", "whole"), [("FT", True), ("DoRA", True), ("DoRA", False)])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_compiled_models(method: str, whole: bool) -> None:
    """A compiled module in the model's place, or the compiled call of a model that is recorded."""
    torch.compiler.reset()
    expected = trained(model_of(method))
    model = model_of(method)
    compiled: Any = torch.compile(model, backend="eager")
    assert_same(trained(compiled) if whole else trained(model, compiled), expected)


class TestGraphs:
    """A step that a CUDA graph holds: nothing is read while it is captured, and it is no step."""

    def test_a_captured_step_is_none_and_that_is_said(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = model_of("FT")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        recorder = dd.Recorder(model, ["query"], every=1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with recorder.attach(optimizer):
            optimizer.step()
            with monkeypatch.context() as capture:
                capture.setattr(torch.cuda, "is_available", lambda: False)  # AdamW's own refusal
                capture.setattr(torch.cuda, "is_initialized", lambda: True)
                capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                capture.setattr(dd.Recorder, "record", None)
                with pytest.warns(UserWarning, match=r"captured .*advance_to\(step\)"):
                    optimizer.step()
            optimizer.step()
        table = recorder.trajectory
        assert table["step"].tolist() == [0, 1, 2]
        assert table["total_decay"].isna().tolist() == [False, False, True]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_replayed_steps_are_recorded_as_others(self) -> None:
        runs: list[Run] = []
        for graphed in (False, True):
            model: Any = model_of("FT").cuda()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True)
            recorder = dd.Recorder(model, ["query", "value"], every=1, run="r")
            x, losses = torch.ones(4, 7, device="cuda"), []

            def step(model: Any = model, optimizer: Any = optimizer, x: Any = x) -> torch.Tensor:
                optimizer.zero_grad(set_to_none=False)
                loss: torch.Tensor = model(x).square().sum()
                loss.backward()
                optimizer.step()
                return loss

            recorder.start(optimizer, count_steps=False)
            side: Any = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for number in range(1, 4):
                    losses.append(step().item())
                    recorder.advance_to(number)
            torch.cuda.current_stream().wait_stream(side)
            graph: Any = torch.cuda.CUDAGraph()
            if graphed:
                with torch.cuda.graph(graph):
                    held = step()
            for number in range(4, 8):
                if graphed:
                    graph.replay()
                losses.append((held if graphed else step()).item())
                recorder.advance_to(number)
            recorder.finish()
            runs.append((losses, recorder.trajectory.drop(columns="total_decay")))
        assert_same(runs[1], runs[0])
