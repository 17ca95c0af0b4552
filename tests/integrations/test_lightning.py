"""The callback in real fits of Lightning's Trainer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from torch import nn

import dora_dynamics as dd

if TYPE_CHECKING:
    from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what lightning's own dependencies say when imported
    lightning = pytest.importorskip("lightning.pytorch")

from dora_dynamics.integrations.lightning import RecorderCallback

pytestmark = [
    # advice of Lightning about speed on machines with more cores and data
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # Lightning's own use of torch's pytree and of its schedulers
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Module(lightning.LightningModule):  # type: ignore[misc,name-defined,unused-ignore]
    def __init__(self, method: str = "FT") -> None:
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("query", nn.Linear(5, 4))
        net.add_module("act", nn.Tanh())
        net.add_module("value", nn.Linear(4, 2))
        if method == "DoRA":
            dd.apply_dora(net, ["query"], rank=2)
        self.net: Any = net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


class TwoOptimizers(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net.value.parameters(), lr=1e-2),
            torch.optim.AdamW(self.net.query.parameters(), lr=1e-2, weight_decay=0.5),
        ]


class Interrupted(Exception):  # noqa: N818
    """Stands for whatever kills a training."""


class Kill(lightning.Callback):  # type: ignore[misc,name-defined,unused-ignore]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Interrupted


class Logger(lightning.loggers.logger.DummyLogger):  # type: ignore[misc,name-defined,unused-ignore]
    """Stands for TensorBoard, W&B and the others."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.logs.setdefault(step, {}).update(metrics)


def batches() -> Any:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, generator=source)
    y = torch.randint(2, (24,), generator=source)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


def trainer(folder: Path, callbacks: list[Any], **settings: Any) -> Any:
    return lightning.Trainer(
        **{
            "default_root_dir": folder,
            "max_steps": 9,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(
                isinstance(c, lightning.callbacks.ModelCheckpoint) for c in callbacks
            ),
            "logger": False,
            "callbacks": callbacks,
        }
        | settings
    )


def checkpoints(folder: Path) -> Any:
    return lightning.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=6, save_top_k=-1
    )


def test_rows_and_changes(tmp_path: Path) -> None:
    module = Module()
    before = module.net.query.weight.detach().clone()
    callback = RecorderCallback(["query"], run_dir=tmp_path / "run", every=4, seed=0)
    trainer(tmp_path, [callback]).fit(module, batches())
    table = dd.load_runs(tmp_path / "run")
    assert table["step"].tolist() == [0, 4, 8, 9]
    assert set(table["site"]) == {"net.query"}
    change = dd.weight_change(before, module.net.query.weight.detach())
    assert table["delta_magnitude"].iloc[-1] == pytest.approx(change.delta_magnitude, rel=1e-6)
    assert table["total_decay"].tolist() == pytest.approx([0.0, 4e-3, 8e-3, 9e-3])
    pd.testing.assert_frame_equal(callback.trajectory, table)


@pytest.mark.parametrize("method", ["FT", "DoRA"])
def test_training_is_bit_identical(tmp_path: Path, method: str) -> None:
    results = []
    for callbacks in ([], [RecorderCallback(["query"], every=1)]):
        module = Module(method)
        trainer(tmp_path, callbacks).fit(module, batches())
        results.append(module.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("method", ["FT", "DoRA"])
def test_resumed_run_has_the_table_of_an_uninterrupted_one(tmp_path: Path, method: str) -> None:
    """Resumed from a step that has no rows: Λ comes from Lightning's own checkpoint."""

    def fit(name: str, *more: Any, ckpt_path: Any = None) -> None:
        callback = RecorderCallback(["query"], every=4, run_dir=tmp_path / name, run="one")
        run = trainer(tmp_path, [callback, checkpoints(tmp_path / f"{name}-ckpt"), *more])
        run.fit(Module(method), batches(), ckpt_path=ckpt_path)

    fit("whole")
    with pytest.raises(Interrupted):
        fit("parts", Kill(7))
    assert dd.load_runs(tmp_path / "parts")["step"].tolist() == [0, 4, 7]
    fit("parts", ckpt_path=tmp_path / "parts-ckpt" / "step=6.ckpt")
    first, second = (tmp_path / name / "trajectory.csv" for name in ("whole", "parts"))
    assert first.read_text() == second.read_text()
    assert dd.load_runs(tmp_path / "whole")["step"].tolist() == [0, 4, 8, 9]


def test_metrics_reach_every_logger(tmp_path: Path) -> None:
    loggers = [Logger(), Logger()]
    callback = RecorderCallback(["query", "value"], every=4)
    trainer(tmp_path, [callback], logger=loggers).fit(Module(), batches())
    table = callback.trajectory.query("role == 'value'").set_index("step")["delta_magnitude"]
    name = "dora_dynamics/value/delta_magnitude"
    for logger in loggers:
        logged = {step: values[name] for step, values in logger.logs.items() if name in values}
        assert logged == pytest.approx(table.to_dict())


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = RecorderCallback(["query"], every=1)
    trainer(tmp_path, [callback], max_steps=3, accumulate_grad_batches=2).fit(Module(), batches())
    assert callback.trajectory["step"].tolist() == [0, 1, 2, 3]


def test_several_optimizers(tmp_path: Path) -> None:
    callback = RecorderCallback(["query"], every=2)
    trainer(tmp_path, [callback], max_steps=4).fit(TwoOptimizers(), batches())
    table = callback.trajectory
    assert table["step"].tolist() == [0, 2, 4]
    assert table["total_decay"].tolist() == pytest.approx([0.0, 0.005, 0.01])


def test_nothing_is_recorded_outside_of_a_fit(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="fit with a Trainer"):
        _ = RecorderCallback(["query"]).trajectory
