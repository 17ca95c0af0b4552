"""The recorder: it changes nothing of the training it watches, and misses no step."""

from __future__ import annotations

import copy
import gc
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics import measurement
from dora_dynamics._kernels import queue_dense_sums
from dora_dynamics.adapters import DoRA, adapter_of, pretrained_weight
from dora_dynamics.baseline import Baselines
from dora_dynamics.followed import Followed
from dora_dynamics.run_directory import RunDirectoryError, read_info, read_run
from dora_dynamics.sites import NoSiteMatchesError
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]

TARGETS = ["query", "value"]
METHODS = ["FT", "LoRA", "DoRA"]


def adapt(model: nn.Module, method: str) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    if method == "LoRA":
        dd.apply_lora(model, TARGETS, rank=2, generator=generator)
    elif method == "DoRA":
        dd.apply_dora(model, TARGETS, rank=2, generator=generator)
    return model


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, **{"lr": 1e-2, "weight_decay": 0.1} | options)


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


def tensors_held(thing: object, seen: set[int] | None = None) -> list[torch.Tensor]:
    """The tensors that an object holds by itself, the model's modules left out."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (nn.Module, torch.optim.Optimizer)):
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    return [tensor for part in parts for tensor in tensors_held(part, seen)]


def recorded_steps(recorder: dd.Recorder) -> list[int]:
    return sorted(recorder.trajectory["step"].unique())


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


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, err_msg=path)
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert one == other, path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapt_first", [True, False])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_rows_are_the_change_of_the_modules_own_weights(
    method: str,
    adapt_first: bool,
    axis: Any,
    tiny_transformer: Build,
    train: Train,
    device: str,
) -> None:
    model = tiny_transformer().to(device).double()
    pretrained = copy.deepcopy(model)
    if adapt_first:
        adapt(model, method)
    recorder = dd.Recorder(model, TARGETS, every=2, axis=axis)
    if not adapt_first:
        adapt(model, method)
    optimizer = adamw(model)
    effective: dict[int, dict[str, torch.Tensor]] = {}

    def keep(step: int) -> None:
        effective[step] = {s.name: weight_of(model, s.name).clone() for s in recorder.sites}

    keep(0)
    with recorder.attach(optimizer):
        train(model, optimizer, 7, after_step=keep)
    table = recorder.trajectory
    assert recorded_steps(recorder) == [0, 2, 4, 6, 7]
    assert set(table["method"]) == set(table["run"]) == {method}
    assert len(table) == 5 * 4
    for row in table.to_dict("records"):
        before = weight_of(pretrained, row["site"])
        expected = dd.weight_change(before, effective[row["step"]][row["site"]], axis)
        for name in ("delta_magnitude", "delta_direction", "update_norm", "magnitude_before"):
            value = getattr(expected, name)
            assert row[name] == pytest.approx(value, rel=1e-8, abs=1e-14), (name, row["step"])
        assert (row["step"] == 0) == (row["update_norm"] < 1e-12)
        assert row["layer"] == int(str(row["site"]).split(".")[1])


def test_gpt2_conv1d_units_are_outputs(tiny_gpt2: Callable[[], Any]) -> None:
    for method in METHODS:
        model = tiny_gpt2()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        recorder = dd.Recorder(model, ["mlp.c_fc"], every=1)
        if method != "FT":
            {"LoRA": dd.apply_lora, "DoRA": dd.apply_dora}[method](model, ["mlp.c_fc"], rank=2)
        optimizer = adamw(model)
        tokens = torch.arange(20).view(2, 10)
        with recorder.attach(optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                torch.autograd.backward(model(tokens, labels=tokens).loss)
                optimizer.step()
        last = recorder.trajectory.iloc[-1]
        assert last["units"] == 48  # 12 inputs
        name = "transformer.h.1.mlp.c_fc"
        expected = dd.weight_change(before[f"{name}.weight"].T, weight_of(model, name).T)
        assert last["delta_magnitude"] == pytest.approx(expected.delta_magnitude, rel=1e-4)
        assert last["delta_direction"] == pytest.approx(expected.delta_direction, rel=1e-3)


class TestSchedule:
    @pytest.mark.parametrize(
        ("every", "expected"),
        [
            (1, [0, 1, 2, 3, 4, 5, 6, 7]),
            (3, [0, 3, 6, 7]),
            (7, [0, 7]),
            (100, [0, 7]),
            (np.int64(3), [0, 3, 6, 7]),
            ([2, 5, 90], [0, 2, 5, 7]),
            ([], [0, 7]),
            ({7}, [0, 7]),
            (range(2, 4), [0, 2, 3, 7]),
            (np.array([1, 4]), [0, 1, 4, 7]),
            (lambda step: step in (1, 2), [0, 1, 2, 7]),
            (lambda step: np.bool_(step == 6), [0, 6, 7]),
        ],
    )
    def test_steps(
        self, every: Any, expected: list[int], tiny_transformer: Build, train: Train
    ) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"], every=every)
        optimizer = adamw(model)
        with recorder.attach(optimizer) as attached:
            assert attached is recorder
            train(model, optimizer, 7)
        assert recorder.step == 7
        assert recorded_steps(recorder) == expected
        assert not recorder.trajectory.duplicated(["step", "site"]).any()

    @pytest.mark.parametrize("every", [0, -3, True, 2.5, "10", [1.5], None])
    def test_what_is_no_schedule(self, every: Any, tiny_transformer: Build) -> None:
        with pytest.raises(ValueError, match="every must be"):
            dd.Recorder(tiny_transformer(), ["query"], every=every)

    def test_attached_twice_goes_on_counting(self, tiny_transformer: Build, train: Train) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"], every=2)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
        train(model, optimizer, 2)  # nobody watches
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        assert recorded_steps(recorder) == [0, 2, 3, 4, 5]

    def test_recording_a_step_again_adds_no_row(self, tiny_transformer: Build) -> None:
        recorder = dd.Recorder(tiny_transformer(), ["query"])
        recorder.record()
        recorder.record()
        assert len(recorder.trajectory) == 2

    def test_nothing_recorded_yet_is_an_empty_table(self, tiny_transformer: Build) -> None:
        table = dd.Recorder(tiny_transformer(), ["query"]).trajectory
        assert len(table) == 0
        assert "delta_direction" in table


class TestInterruption:
    def test_exception_in_the_loop_keeps_all_rows(
        self, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, TARGETS, every=2, run_dir=tmp_path / "run")
        optimizer = adamw(model)

        def fail(step: int) -> None:
            if step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), recorder.attach(optimizer):
            train(model, optimizer, 9, after_step=fail)
        assert recorded_steps(recorder) == [0, 2, 4, 5]
        pd.testing.assert_frame_equal(
            dd.load_runs([tmp_path / "run"]), recorder.trajectory, check_exact=True
        )
        train(model, optimizer, 2)  # the hook is gone
        assert recorder.step == 5

    def test_killed_training_keeps_every_complete_row(self, tmp_path: Path) -> None:
        program = """
import sys, torch, dora_dynamics as dd
from torch import nn
model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 5))
recorder = dd.Recorder(model, ["*"], every=1, run_dir=sys.argv[1], keep="weights")
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with recorder.attach(optimizer):
    while True:
        optimizer.zero_grad()
        model(torch.randn(3, 9)).square().sum().backward()
        optimizer.step()
"""
        run = tmp_path / "run"
        process = subprocess.Popen([sys.executable, "-c", program, str(run)])
        try:
            deadline = time.monotonic() + PATIENCE
            file = run / "trajectory.csv"
            while not file.exists() or file.read_bytes().count(b"\n") < 12:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
        table = dd.load_runs([run])
        assert len(table) >= 11
        steps = table["step"].to_numpy()
        assert (np.diff(steps) >= 0).all()
        assert set(np.diff(steps)) <= {0, 1}
        assert table["delta_direction"].notna().all()
        pd.testing.assert_frame_equal(dd.remeasure(run), table, check_exact=True)

    def test_non_finite_training_is_recorded_as_such(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        model = tiny_transformer()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e38)
        recorder = dd.Recorder(model, TARGETS, every=1)
        with recorder.attach(optimizer):
            train(model, optimizer, 4)
        last = recorder.trajectory.query("step == 4")
        assert (last["non_finite"] > 0).all()
        assert last["delta_magnitude"].isna().all()


class TestBaseline:
    @pytest.mark.parametrize("method", ["LoRA", "DoRA"])
    @pytest.mark.parametrize("adapt_first", [True, False])
    @pytest.mark.parametrize("hand_over_everything", [True, False])
    def test_frozen_weights_are_not_copied(
        self,
        method: str,
        adapt_first: bool,
        hand_over_everything: bool,
        tiny_transformer: Build,
        train: Train,
    ) -> None:
        model = tiny_transformer()
        if adapt_first:
            adapt(model, method)
        recorder = dd.Recorder(model, TARGETS, every=1)
        adapt(model, method) if not adapt_first else None
        parameters = [p for p in model.parameters() if p.requires_grad or hand_over_everything]
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
            frozen = {
                pretrained_weight(module).data_ptr()
                for module in model.modules()
                if adapter_of(module) is not None
            }
            held = {tensor.data_ptr() for tensor in tensors_held(recorder)}
        assert len(frozen) == 4
        assert held == frozen
        assert recorder.trajectory.query("step == 3")["delta_direction"].min() > 0

    def test_weights_unfrozen_during_training_keep_their_baseline(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        model = tiny_transformer()
        queries = [p for n, p in model.named_parameters() if "query" in n]
        for parameter in queries:
            parameter.requires_grad_(False)
        before = copy.deepcopy(model)
        recorder = dd.Recorder(model, TARGETS, every=1)
        optimizer = adamw(model)

        def unfreeze(step: int) -> None:
            if step == 2:
                for parameter in queries:
                    parameter.requires_grad_(True)
                optimizer.add_param_group({"params": queries})

        with recorder.attach(optimizer):
            train(model, optimizer, 4, after_step=unfreeze)
        query = recorder.trajectory.query("role == 'query' and layer == 1").set_index("step")
        assert (query["update_norm"].loc[:2] == 0).all()
        expected = dd.weight_change(
            weight_of(before, "layers.1.query"), weight_of(model, "layers.1.query")
        )
        assert query["update_norm"].loc[4] == pytest.approx(expected.update_norm)
        assert expected.update_norm > 0

    def test_weights_changed_below_an_adapter_are_warned_about(
        self, tiny_transformer: Build
    ) -> None:
        model = adapt(tiny_transformer(), "LoRA")
        recorder = dd.Recorder(model, ["layers.0.query"])
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        with pytest.warns(UserWarning, match=r"layers\.0\.query was changed in place"):
            recorder.record()

    def test_optimizer_that_trains_nothing_followed(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        optimizer = adamw(model)
        recorder = dd.Recorder(model, ["query"])
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        elsewhere = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
        with (
            pytest.warns(UserWarning, match="trains no parameter of the followed weights"),
            recorder.attach(elsewhere),
        ):
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with dd.Recorder(model, ["query"]).attach(optimizer):
                pass

    def test_merging_while_attached_measures_the_merged_weight(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        model = adapt(tiny_transformer(), "DoRA")
        recorder = dd.Recorder(model, TARGETS, every=100)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
            before = copy.deepcopy(model)
            dd.merge(model)
        expected = dd.Recorder(before, TARGETS)
        expected.step = 3
        expected.record()
        np.testing.assert_allclose(
            recorder.trajectory.query("step == 3")["delta_direction"],
            expected.trajectory["delta_direction"],
            rtol=1e-4,
        )


class TestForeignParametrizations:
    """Weights that a parametrization of torch's own computes."""

    def test_spectral_norm_is_not_disturbed(self, tiny_transformer: Build, train: Train) -> None:
        results = []
        for watch in (False, True):
            model = tiny_transformer()
            for layer in ("layers.0.query", "layers.1.query"):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(3)
                    nn.utils.parametrizations.spectral_norm(model.get_submodule(layer))
            optimizer = adamw(model)
            torch.manual_seed(0)
            if watch:
                recorder = dd.Recorder(model, ["query"], every=1, method="spectral")
                with recorder.attach(optimizer):
                    train(model, optimizer, 4)
                assert recorder.trajectory.query("step == 0")["update_norm"].max() == 0
                assert recorder.trajectory.query("step == 4")["update_norm"].min() > 0
                assert recorder.trajectory["total_decay"].iloc[-2:].isna().all()
            else:
                train(model, optimizer, 4)
            results.append(model.state_dict())
        assert_same(results[0], results[1])

    def test_weight_norm_inside_a_cache(self, tiny_transformer: Build, train: Train) -> None:
        model = tiny_transformer()
        nn.utils.parametrizations.weight_norm(model.get_submodule("layers.0.query"))
        recorder = dd.Recorder(model, ["layers.0.query"], every=1, method="weight norm")
        optimizer = adamw(model)
        tokens = torch.arange(33).view(3, 11) % 11
        with recorder.attach(optimizer):
            for _ in range(2):
                with nn.utils.parametrize.cached():
                    recorder.step += 1
                    recorder.record()
                    optimizer.zero_grad()
                    torch.autograd.backward(model(tokens).square().sum())
                gradients = [p.grad for n, p in model.named_parameters() if "layers.0.query" in n]
                assert all(g is not None and g.abs().max() > 0 for g in gradients)

    def test_unknown_method_must_be_named(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        dd.apply_lora(model, ["layers.0.query"])
        assert dd.Recorder(model, ["query"]).method == "LoRA"  # the other query is frozen
        model.get_submodule("layers.1.query").requires_grad_(True)
        with pytest.raises(ValueError, match="do not share one known method: pass method="):
            dd.Recorder(model, ["query"])
        assert dd.Recorder(model, ["query"], method="half").method == "half"


class TestTotalDecay:
    def test_equals_the_sum_of_rate_times_decay_under_a_schedule(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        for method in METHODS:
            model = adapt(tiny_transformer(), method)
            recorder = dd.Recorder(model, TARGETS, every=1)
            optimizer = adamw(model, lr=0.02, weight_decay=0.3)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
            rates = [0.0]

            def step(_: int) -> None:
                rates.append(seen[-1])  # noqa: B023
                scheduler.step()  # noqa: B023
                seen.append(float(optimizer.param_groups[0]["lr"]))  # noqa: B023

            seen = [float(optimizer.param_groups[0]["lr"])]
            with recorder.attach(optimizer):
                train(model, optimizer, 6, after_step=step)
            expected = np.cumsum(rates) * 0.3 * (method != "LoRA")
            for _, path in recorder.trajectory.groupby("site"):
                np.testing.assert_allclose(path["total_decay"], expected, rtol=1e-12)

    def test_shrinks_what_it_says_it_shrinks(self, tiny_transformer: Build) -> None:
        """With gradients of zero, AdamW's decay is all that happens: Λ is the relative ΔM."""
        for method in METHODS:
            model = adapt(tiny_transformer().double(), method)
            recorder = dd.Recorder(model, TARGETS, every=1)
            optimizer = adamw(model, lr=1e-4, weight_decay=0.1)
            with recorder.attach(optimizer):
                for _ in range(3):
                    for parameter in model.parameters():
                        parameter.grad = torch.zeros_like(parameter)
                        if not parameter.requires_grad:
                            parameter.grad = None
                    optimizer.step()
            last = recorder.trajectory.query("step == 3")
            np.testing.assert_allclose(
                last["relative_delta_magnitude"], last["total_decay"], rtol=1e-4, atol=1e-14
            )

    @pytest.mark.parametrize(
        ("optimizer_class", "options", "expected"),
        [
            (torch.optim.Adam, {"weight_decay": 0.1}, np.nan),
            (torch.optim.Adam, {"weight_decay": 0.0}, 0.0),
            (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, 0.003),
            (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, 0.003),
            (torch.optim.NAdam, {"weight_decay": 0.1}, np.nan),
            (torch.optim.SGD, {}, 0.0),
            (torch.optim.AdamW, {"weight_decay": 0.1}, 0.003),
        ],
    )
    def test_nan_where_decay_is_coupled(
        self,
        optimizer_class: Any,
        options: dict[str, Any],
        expected: float,
        tiny_transformer: Build,
        train: Train,
    ) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["query"])
        optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
        np.testing.assert_allclose(
            recorder.trajectory.query("step == 3")["total_decay"], expected, rtol=1e-12
        )

    def test_groups_without_decay(self, tiny_transformer: Build, train: Train) -> None:
        model = tiny_transformer()
        named = dict(model.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if "query" in n], "weight_decay": 0.0},
            {"params": [p for n, p in named.items() if "query" not in n], "weight_decay": 0.5},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        recorder = dd.Recorder(model, TARGETS)
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        last = recorder.trajectory.query("step == 2").groupby("role")["total_decay"].max()
        assert last["query"] == 0
        assert last["value"] == pytest.approx(2 * 0.01 * 0.5)


class TestRunDirectory:
    def test_holds_what_was_said_and_seen(
        self, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        recorder = dd.Recorder(
            model,
            TARGETS,
            run_dir=tmp_path / "deep" / "ft-0",
            seed=3,
            hyperparameters={"batch": 8, "note": "größe"},
        )
        adapt(model, "DoRA")
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=torch.tensor(0.01),
            betas=(0.9, 0.95),
        )
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        info = read_info(tmp_path / "deep" / "ft-0")
        assert (info.run, info.method, info.seed, info.axis) == ("ft-0", "DoRA", 3, "output")
        assert info.targets == TARGETS
        assert info.sites == [site.name for site in recorder.sites]
        assert info.model == "TinyTransformer"
        assert info.hyperparameters["note"] == "größe"
        assert info.hyperparameters["optimizer"] == "AdamW"
        group = info.hyperparameters["parameter_groups"][0]
        assert group["lr"] == pytest.approx(0.01)
        assert group["betas"] == [0.9, 0.95]
        assert torch.__version__.startswith(info.versions["torch"])
        assert set(read_run(tmp_path / "deep" / "ft-0")["method"]) == {"DoRA"}

    def test_that_holds_a_run_is_refused(self, tiny_transformer: Build, tmp_path: Path) -> None:
        model = tiny_transformer()
        first = dd.Recorder(model, TARGETS, run_dir=tmp_path, keep=["units", "weights"])
        first.record()
        kept = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        assert len(kept) == 5 + 1  # and the lock, while it is recorded
        with pytest.raises(RunDirectoryError, match=r"already holds a run: .* overwrite=True"):
            dd.Recorder(model, TARGETS, run_dir=tmp_path)
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == kept
        for left in ("weights/step-3.partial", "units/.tmpKilled"):  # by a run killed in a write
            (tmp_path / left).touch()
        dd.Recorder(model, TARGETS, run_dir=tmp_path, overwrite=True)
        assert len(read_run(tmp_path)) == 0
        del first
        files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
        assert files == {"run.json", "trajectory.csv"}

    def test_bad_arguments_leave_the_old_run_alone(
        self, tiny_transformer: Build, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        dd.Recorder(model, TARGETS, run_dir=tmp_path).record()
        bad: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"hyperparameters": {"path": tmp_path}}, TypeError, "hyperparameters must hold JSON"),
            ({"hyperparameters": {"lr": float("nan")}}, TypeError, "must hold JSON values only"),
            ({"keep": "everything"}, ValueError, r"not \['everything'\]"),
            ({"axis": "rows"}, ValueError, "axis must be 'output' or 'input', not 'rows'"),
            ({"every": 0}, ValueError, "every must be at least 1"),
        ]
        for options, error, message in bad:
            with pytest.raises(error, match=message):
                dd.Recorder(model, TARGETS, run_dir=tmp_path, overwrite=True, **options)
        with pytest.raises(NoSiteMatchesError, match=r"'nothing'.*'query' \(2, such as layers.0"):
            dd.Recorder(model, ["nothing"], run_dir=tmp_path, overwrite=True)
        assert len(read_run(tmp_path)) == 4

    def test_keep_needs_a_directory(self, tiny_transformer: Build) -> None:
        with pytest.raises(ValueError, match="needs a run_dir"):
            dd.Recorder(tiny_transformer(), TARGETS, keep="units")

    def test_json_is_plain(self, tiny_transformer: Build, tmp_path: Path) -> None:
        dd.Recorder(tiny_transformer(), TARGETS, run_dir=tmp_path)
        assert json.loads((tmp_path / "run.json").read_text())["schema_version"] == 1


def test_magnitude_of_a_dora_weight_is_m(tiny_transformer: Build, train: Train) -> None:
    model = adapt(tiny_transformer().double(), "DoRA")
    recorder = dd.Recorder(model, ["layers.0.query"])
    module = model.get_submodule("layers.0.query")
    adapter = adapter_of(module)
    assert isinstance(adapter, DoRA)
    with torch.no_grad():
        adapter.magnitude[2] *= -1
    optimizer = adamw(model)
    with recorder.attach(optimizer):
        train(model, optimizer, 3)
    m, m0 = adapter.magnitude.detach().abs().numpy(), dd.magnitude(pretrained_weight(module))
    last = recorder.trajectory.iloc[-1]
    assert last["delta_magnitude"] == pytest.approx(np.abs(m - m0).mean(), rel=1e-12)
    assert last["delta_direction"] > 1.9 / 6


class TestBesideTraining:
    """On a GPU a step queues its measurement and goes on; here a gate stands for the GPU."""

    @pytest.fixture
    def gate(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """Measurements end when it is set; weights are read when they are queued."""
        gate = threading.Event()
        finish = measurement.Measurement.finish

        def gated(self: measurement.Measurement) -> Any:
            assert gate.wait(60)
            return finish(self)

        monkeypatch.setattr(measurement.Measurement, "finish", gated)
        monkeypatch.setattr(Baselines, "is_on_gpu", property(lambda _: True))
        return gate

    @pytest.mark.parametrize("method", METHODS)
    def test_training_does_not_wait_and_the_rows_are_the_same(
        self,
        method: str,
        gate: threading.Event,
        tiny_transformer: Build,
        train: Train,
        seed_everything: Callable[[int], None],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seed_everything(0)
        model = adapt(tiny_transformer(), method)
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=tmp_path / "beside", run="one")
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
            assert recorder.step == 3
            assert recorder._recording.rows.are_none
            gate.set()
            recorder.state_dict()
            assert len(dd.load_runs([tmp_path / "beside"])) == 4 * 4
        monkeypatch.undo()
        seed_everything(0)
        model = adapt(tiny_transformer(), method)
        plain = dd.Recorder(model, TARGETS, every=1, run="one")
        optimizer = adamw(model)
        with plain.attach(optimizer):
            train(model, optimizer, 3)
        assert recorder.trajectory.equals(plain.trajectory)
        assert dd.load_runs([tmp_path / "beside"]).equals(plain.trajectory)

    def test_what_goes_wrong_there_is_raised_where_it_is_strict(
        self, gate: threading.Event, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        run = tmp_path / "run"
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=run, strict=True)
        optimizer = adamw(model)
        with pytest.raises(FileNotFoundError), recorder.attach(optimizer):  # noqa: PT012
            shutil.rmtree(run)
            gate.set()
            train(model, optimizer, 2)
        assert not recorder.is_attached

    def test_kept_weights_are_those_of_their_step(
        self, gate: threading.Event, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        gate.set()
        model = tiny_transformer()
        run = tmp_path / "run"
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=run, keep=["weights", "units"])
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
        assert dd.remeasure(run).equals(recorder.trajectory)


def pairs_summed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Bytes of each pair of weights, a list for every call that sums some, from now on."""
    calls: list[list[int]] = []

    def counting(pairs: list[Any], *more: Any) -> Any:
        calls.append([before.nbytes + after.nbytes for before, after in pairs])
        return queue_dense_sums(pairs, *more)

    monkeypatch.setattr(measurement, "queue_dense_sums", counting)
    return calls


class TestCounts:
    """What a recorded step costs, in counts: they hold on any machine."""

    def test_one_summing_for_all_weights(
        self, tiny_transformer: Build, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a GPU that is a launch for each layout and one transfer (tests/kernels)."""
        calls = pairs_summed(monkeypatch)
        model = tiny_transformer()
        recorder = dd.Recorder(model, ["*.query", "*.key", "*.value", "*.out_proj"], every=2)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 6)
        assert [len(sizes) for sizes in calls] == [8] * 4

    def test_bytes_read_are_those_of_both_weights(
        self, tiny_transformer: Build, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = pairs_summed(monkeypatch)
        model = tiny_transformer()
        recorder = dd.Recorder(model, TARGETS, every=1)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 1)
        once = sum(weight_of(model, f"layers.{i}.{t}").nbytes for i in (0, 1) for t in TARGETS)
        assert [sum(sizes) for sizes in calls] == [2 * once] * 2

    @pytest.mark.parametrize("method", METHODS)
    def test_a_step_that_is_not_recorded_looks_nothing_up_again(
        self, method: str, tiny_transformer: Build, train: Train, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = adapt(tiny_transformer(), method)
        recorder = dd.Recorder(model, TARGETS, every=5)
        optimizer = adamw(model)
        looked: list[str] = []
        magnitude = Followed.magnitude

        def counting(self: Followed) -> Any:
            looked.append(self.parameter)
            return magnitude(self)

        monkeypatch.setattr(Followed, "magnitude", counting)
        with recorder.attach(optimizer):
            counts = []
            for _ in range(10):
                train(model, optimizer, 1)
                counts.append(len(looked))
        assert counts == [4] * 5 + [8] * 5
        tracked = recorder.trajectory.groupby("step")["total_decay"].unique()
        monkeypatch.undo()
        assert all(len(values) == 1 for values in tracked)

    def test_a_recorder_that_is_dropped_is_gone_at_once(
        self, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        """With W_0 and its hold on the run directory, without the garbage collector."""
        model = tiny_transformer()
        recorder = dd.Recorder(model, TARGETS, every=1, run_dir=tmp_path / "run")
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 1)
        dropped = weakref.ref(recorder)
        gc.disable()
        try:
            del recorder
            assert dropped() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("method", METHODS)
    def test_tensors_held_do_not_grow_with_steps(
        self, method: str, tiny_transformer: Build, train: Train, device: str
    ) -> None:
        model = adapt(tiny_transformer().to(device), method)
        recorder = dd.Recorder(model, TARGETS, every=1)
        optimizer = adamw(model)
        held, allocated = [], []
        with recorder.attach(optimizer):
            for _ in range(3):
                train(model, optimizer, 10)
                recorder.state_dict()
                held.append(sum(tensor.nbytes for tensor in tensors_held(recorder)))
                allocated.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
        assert held[0] == held[1] == held[2]
        assert allocated[1] == allocated[2]
