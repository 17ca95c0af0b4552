"""Accelerate and transformers' Trainer on several processes: one run, as one process has it."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import dora_dynamics as dd
from tests.distributed.recording import (
    TARGETS,
    Net,
    net,
    one_folder,
    table_difference,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

AVAILABLE = all(importlib.util.find_spec(name) for name in ("transformers", "accelerate"))
STEPS = 4


class Batched(Net):
    """A model as the Trainer calls it."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(x)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


def data() -> list[dict[str, torch.Tensor]]:
    """The same samples on every process."""
    source = torch.Generator().manual_seed(5)
    make = {"generator": source, "dtype": torch.float64}
    return [
        {"x": torch.randn(12, **make), "labels": torch.randn(3, **make)}  # type: ignore[call-overload]
        for _ in range(8 * STEPS)
    ]


def model_of(kind: type[Net]) -> Net:
    model = kind()
    model.load_state_dict(net("cpu").state_dict())
    return model.to(torch.float64)


def by_trainer(folder: Path, processes: int, *, sharded: bool = False) -> pd.DataFrame:
    """Eight samples a step, over all processes; `sharded` by FSDP2."""
    from accelerate import FullyShardedDataParallelPlugin
    from transformers import Trainer, TrainingArguments

    from dora_dynamics.integrations.transformers import RecorderCallback

    class Sharding(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            offer_fsdp(self.accelerator, plugin)
            self.is_fsdp_enabled = True

    by_block = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"]}
    args = TrainingArguments(
        str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=8 // processes,
        report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=2,
        learning_rate=1e-2, optim="adamw_torch", weight_decay=0.1, max_grad_norm=1.0, seed=0,
        ddp_backend="gloo" if processes > 1 else None, dataloader_pin_memory=False,
        fsdp="full_shard auto_wrap" if sharded else "", fsdp_config=by_block if sharded else None,
    )  # fmt: skip
    run_dir = folder / ("trainer, sharded" if sharded else "trainer")
    callback = RecorderCallback(TARGETS, every=1, run_dir=run_dir)
    trainer: Any = (Sharding if sharded else Trainer)(
        model=model_of(Batched),
        args=args,
        train_dataset=data(),
        callbacks=[callback],
    )
    trainer.train()
    assert sharded == isinstance(next(trainer.model.parameters()), DTensor)
    return callback.trajectory


def offer_fsdp(accelerator: Any, plugin: Any) -> None:
    """Without a GPU, Accelerate does not offer FSDP, but what it does then works."""
    from accelerate.utils import DistributedType

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def by_accelerate(folder: Path | None, sharded: str | None = None) -> pd.DataFrame:
    """A loop of one's own; `sharded` by FSDP2, where all or only the first process loads."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True)
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=sharded == "the first loads",
        )
        offer_fsdp(accelerator, plugin)
    model: Any = model_of(Net)
    if sharded == "the first loads" and dist.get_rank() > 0:
        for parameter in model.parameters():
            parameter.data = torch.full_like(parameter, torch.nan)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loader: Any = torch.utils.data.DataLoader(
        data(),  # type: ignore[arg-type]
        batch_size=8 // accelerator.num_processes,
    )
    recorder = dd.Recorder(model, TARGETS, every=1, run_dir=folder)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with recorder.attach(optimizer):
        for batch in loader:
            accelerator.backward(torch.nn.functional.mse_loss(model(batch["x"]), batch["labels"]))
            optimizer.step()
            optimizer.zero_grad()
    return recorder.trajectory


def forget_processes() -> None:
    """Make Accelerate ask again who is there."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


def one_run_for_all(expected: Mapping[str, pd.DataFrame]) -> float:
    """Each way on all processes, against the tables that one process wrote."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    worst = 0.0
    with one_folder() as folder:
        for name in (
            "trainer", "trainer, sharded", "accelerate", "all load", "the first loads",
        ):  # fmt: skip
            forget_processes()
            if "trainer" in name:
                table = by_trainer(folder, 2, sharded="sharded" in name)
            else:
                table = by_accelerate(folder / name, None if name == "accelerate" else name)
            dist.barrier()
            pd.testing.assert_frame_equal(dd.load_runs(folder / name), table)
            single = expected["trainer" if "trainer" in name else "accelerate"]
            assert table["run"].unique().tolist() == [name]
            worst = max(worst, table_difference(table, single))
            dist.barrier()
            assert sorted(p.name for p in (folder / name).iterdir()) == [
                "run.json", "trajectory.csv",
            ]  # fmt: skip
    return worst


def on_one_process(folder: Path) -> dict[str, pd.DataFrame]:
    """What one process records, in Accelerate's loop and the Trainer's."""
    tables = {"trainer": by_trainer(folder, 1)}
    forget_processes()
    tables["accelerate"] = by_accelerate(None)
    forget_processes()
    return tables
