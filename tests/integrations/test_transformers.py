"""The callback in real runs of transformers' Trainer."""

from __future__ import annotations

import importlib
import shutil
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch

import dora_dynamics as dd
from dora_dynamics.runs import directory
from dora_dynamics.runs.directory import RunDirectoryError

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dora_dynamics.integrations.transformers import RecorderCallback  # noqa: E402

pytestmark = [
    # Trainer asks its dataloader to pin memory whether or not there is an accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


class Interrupted(Exception):  # noqa: N818
    """Stands for whatever kills a training."""


class Kill(transformers.TrainerCallback):  # type: ignore[misc,name-defined,unused-ignore]
    """Ends a training in the middle, as a lost machine does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Interrupted


class Logger(transformers.TrainerCallback):  # type: ignore[misc,name-defined,unused-ignore]
    """Stands for TensorBoard and its like: a callback that the Trainer calls before the user's."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def data(size: int = 64) -> list[dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(20, (6,), generator=source),
            "labels": torch.randint(2, (), generator=source),
        }
        for _ in range(size)
    ]


def trainer(folder: Path, callbacks: list[Any], net: Any = None, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder / "out"),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "save_steps": 3,
            "logging_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 11,
        }
        | settings
    )
    return transformers.Trainer(
        model=model() if net is None else net,
        args=arguments,
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=callbacks,
    )


def weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, weights(second)[name]) for name, a in weights(first).items())


def test_rows_of_scheduled_and_saved_steps(tmp_path: Path) -> None:
    callback = RecorderCallback(["query", "value"], run_dir=tmp_path / "run", every=4)
    run = trainer(tmp_path, [callback])
    before = weights(run.model)
    run.train()
    table = dd.load_runs(tmp_path / "run")
    assert sorted(table["step"].unique()) == [0, 3, 4, 6, 8]
    assert set(table["method"]) == {"FT"}
    for row in table.query("step == 8").itertuples():
        change = dd.weight_change(
            before[f"{row.site}.weight"], run.model.state_dict()[f"{row.site}.weight"]
        )
        assert row.delta_magnitude == pytest.approx(change.delta_magnitude, rel=1e-6)
    assert (table.query("step > 0")["update_norm"] > 0).all()
    pd.testing.assert_frame_equal(callback.trajectory, table)
    info = directory.read_info(tmp_path / "run")
    assert info.seed == 11
    assert info.hyperparameters["optimizer"] == "AdamW"
    assert info.hyperparameters["max_steps"] == 8


def test_rows_match_the_checkpoints_of_their_steps(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    callback = RecorderCallback(["query"], every=100)
    run = trainer(tmp_path, [callback])
    before = weights(run.model)
    run.train()
    for step in (3, 6):
        saved = load_file(tmp_path / "out" / f"checkpoint-{step}" / "model.safetensors")
        for row in callback.trajectory.query(f"step == {step}").itertuples():
            name = f"{row.site}.weight"
            change = dd.weight_change(before[name], saved[name])
            assert row.delta_direction == pytest.approx(change.delta_direction, rel=1e-6)


@pytest.mark.parametrize("method", ["FT", "LoRA", "DoRA"])
def test_training_is_bit_identical(tmp_path: Path, method: str) -> None:
    runs = []
    for callbacks in ([], [RecorderCallback(["query"], every=1, run_dir=tmp_path / method)]):
        net = model()
        if method != "FT":
            apply = dd.apply_lora if method == "LoRA" else dd.apply_dora
            apply(net, ["query"], rank=2, generator=torch.Generator().manual_seed(0))
        run = trainer(tmp_path, callbacks, net, save_strategy="no")
        result = run.train()
        runs.append((run.model, result.training_loss))
    assert same_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert set(dd.load_runs(tmp_path / method)["method"]) == {method}


@pytest.mark.parametrize("steps_when_killed", [4, 5])
def test_resumed_run_has_the_table_of_an_uninterrupted_one(
    tmp_path: Path, steps_when_killed: int
) -> None:
    def callback(name: str) -> RecorderCallback:
        return RecorderCallback(
            ["query", "value"], every=2, run_dir=tmp_path / name, run="one", keep=["units"]
        )

    whole = trainer(tmp_path / "a", [callback("whole")])
    whole.train()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "b", [callback("parts"), Kill(steps_when_killed)]).train()
    assert dd.load_runs(tmp_path / "parts")["step"].max() == 4
    parts = trainer(tmp_path / "b", [callback("parts")])
    parts.train(resume_from_checkpoint=True)
    assert same_weights(whole.model, parts.model)
    first, second = (tmp_path / name / "trajectory.csv" for name in ("whole", "parts"))
    assert first.read_text() == second.read_text()
    kept = [sorted(p.name for p in (tmp_path / n / "units").iterdir()) for n in ("whole", "parts")]
    assert kept[0] == kept[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_resume_with_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def run(name: str, *more: Any) -> Any:
        torch.manual_seed(5)
        net = peft.get_peft_model(
            model(), peft.LoraConfig(target_modules=["query"], r=2, use_dora=True)
        )
        callback = RecorderCallback(["query"], every=2, run_dir=tmp_path / name, run="one")
        return trainer(tmp_path / f"out-{name}", [callback, *more], net)

    run("whole").train()
    with pytest.raises(Interrupted):
        run("parts", Kill(5)).train()
    run("parts").train(resume_from_checkpoint=True)
    first, second = (tmp_path / name / "trajectory.csv" for name in ("whole", "parts"))
    assert first.read_text() == second.read_text()
    assert set(dd.load_runs(tmp_path / "whole")["method"]) == {"DoRA"}


def test_resume_of_a_callback_that_came_late(tmp_path: Path) -> None:
    """Added after the Trainer was made, it sees the checkpoint's weights: it needs the kept W_0."""
    for keep in ((), ("weights",)):
        folder = tmp_path / ("kept" if keep else "not")

        def late(folder: Path = folder, keep: Any = keep) -> RecorderCallback:
            return RecorderCallback(["query"], every=1, run_dir=folder / "run", keep=keep)

        first = trainer(folder, [Kill(5)])
        first.add_callback(late())
        with pytest.raises(Interrupted):
            first.train()
        second = trainer(folder, [])
        second.add_callback(late())
        if keep:
            second.train(resume_from_checkpoint=True)
            table = dd.load_runs(folder / "run")
            assert table["step"].tolist() == sorted([*range(9), *range(9)])
            pd.testing.assert_frame_equal(dd.remeasure(folder / "run"), table)
        else:
            with pytest.raises(RunDirectoryError, match="make the recorder before the checkpoint"):
                second.train(resume_from_checkpoint=True)


def test_metrics_reach_every_logger_and_the_history(tmp_path: Path) -> None:
    logger = Logger()
    callback = RecorderCallback(["query", "value"], every=2)
    run = trainer(tmp_path, [logger, callback], save_strategy="no")
    run.train()
    name = "dora_dynamics/query/delta_magnitude"
    logged = [log for log in logger.logs if name in log]
    assert [log["dora_dynamics/step"] for log in logged] == [2.0, 4.0, 6.0, 8.0]
    table = callback.trajectory.query("role == 'query'").groupby("step")["delta_magnitude"].mean()
    assert [log[name] for log in logged] == pytest.approx(table.loc[[2, 4, 6, 8]].tolist())
    assert [log["step"] for log in run.state.log_history if name in log] == [2, 4, 6, 8]
    own = {key for key in logged[0] if key.startswith("dora_dynamics/")}
    assert own == {
        "dora_dynamics/step",
        *(f"dora_dynamics/{role}/{column}" for role in ("query", "value")
          for column in ("delta_magnitude", "delta_direction", "unit_coupling")),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_gets_them_with_no_extra_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    run = trainer(
        tmp_path, [RecorderCallback(["query"], every=2)], save_strategy="no",
        report_to="tensorboard",
    )  # fmt: skip
    run.train()
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert any("dora_dynamics/query/delta_magnitude" in tag for tag in events.Tags()["scalars"])


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = RecorderCallback(["query"], every=1)
    trainer(
        tmp_path, [callback], max_steps=3, gradient_accumulation_steps=2, save_strategy="no"
    ).train()
    table = callback.trajectory
    assert sorted(table["step"].unique()) == [0, 1, 2, 3]
    decay = table.groupby("step")["total_decay"].first()
    # a linear schedule from 1e-2 to zero over three steps, times 0.1
    assert decay.tolist() == pytest.approx([0, 1e-3, 1e-3 * 5 / 3, 2e-3])


def test_best_model_is_not_taken_for_the_last_step(tmp_path: Path) -> None:
    callback = RecorderCallback(["query"], every=100)
    run = trainer(
        tmp_path, [callback], max_steps=6, save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        learning_rate=1e-1,
    )  # fmt: skip
    before = weights(run.model)
    run.train()
    assert sorted(callback.trajectory["step"].unique()) == [0, 2, 4, 6]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "checkpoint-6" / "model.safetensors")
    row = callback.trajectory.query("step == 6").iloc[0]
    change = dd.weight_change(before[f"{row['site']}.weight"], saved[f"{row['site']}.weight"])
    assert row["update_norm"] == pytest.approx(change.update_norm, rel=1e-6)


def test_model_init(tmp_path: Path) -> None:
    callback = RecorderCallback(["query"], every=2)
    run = transformers.Trainer(
        model_init=lambda: model(),
        args=trainer(tmp_path, [], save_strategy="no").args,
        train_dataset=data(),
        callbacks=[callback],
    )
    run.train()
    assert sorted(callback.trajectory["step"].unique()) == [0, 2, 4, 6, 8]
    assert (callback.trajectory.query("step > 0")["update_norm"] > 0).all()


def test_resume_without_a_run_directory_does_not_make_up_the_decay(tmp_path: Path) -> None:
    trainer(tmp_path, [], max_steps=3).train()
    callback = RecorderCallback(["query"], every=1)
    trainer(tmp_path, [callback], max_steps=5).train(resume_from_checkpoint=True)
    table = callback.trajectory
    assert sorted(table["step"].unique()) == [3, 4, 5]
    assert table["total_decay"].isna().all()
    assert (table["update_norm"] > 0).all()


def test_run_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    options: dict[str, Any] = {"run_dir": tmp_path / "run", "every": 4}
    trainer(tmp_path, [RecorderCallback(["query"], **options)], max_steps=1).train()
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        trainer(tmp_path, [RecorderCallback(["query"], **options)], max_steps=1).train()
    shutil.rmtree(tmp_path / "out")
    again = RecorderCallback(["query"], overwrite=True, **options)
    trainer(tmp_path, [again], max_steps=1).train()
    assert dd.load_runs(tmp_path / "run")["step"].max() == 1


def test_what_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="give the callback to a Trainer"):
        _ = RecorderCallback(["query"]).trajectory
    net = model()
    next(net.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3"):
        trainer(tmp_path, [RecorderCallback(["query"])], net)
    with pytest.raises(ValueError, match="kwery"):
        trainer(tmp_path, [RecorderCallback(["kwery"])])


def test_every_option_of_the_recorder_passes_through(tmp_path: Path) -> None:
    callback = RecorderCallback(
        ["query"], every=4, granularity="head", axis="input", method="mine", seed=7,
        hyperparameters={"note": "x"}, run_dir=tmp_path / "run",
    )  # fmt: skip
    trainer(tmp_path, [callback], max_steps=4, save_strategy="no").train()
    info = directory.read_info(tmp_path / "run")
    assert (info.axis, info.method, info.seed) == ("input", "mine", 7)
    assert info.hyperparameters["note"] == "x"
    assert set(callback.trajectory["head"]) == {0, 1}
