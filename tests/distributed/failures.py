"""What fails on one process of a sharded training: none of them stops, and none waits."""

from __future__ import annotations

import resource
import shutil
import warnings
from contextlib import contextmanager
from contextlib import nullcontext as nothing
from typing import TYPE_CHECKING, Any
from unittest import mock

import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import dora_dynamics as dd
from dora_dynamics import _kernels
from dora_dynamics.recording.baseline import Baselines
from dora_dynamics.recording.followed import Followed
from dora_dynamics.recording.measuring import Measuring
from dora_dynamics.recording.rows import RecordedRows
from dora_dynamics.recording.watch import Watch
from dora_dynamics.sharded import shares
from dora_dynamics.sharded.collectives import told
from tests.conftest import IS_CAMPAIGN
from tests.distributed.recording import (
    HAS_PEFT,
    TARGETS,
    Twin,
    adapted,
    by_fsdp,
    by_tp,
    net,
    one_folder,
    optimizer_of,
    step_with,
    table_difference,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from dora_dynamics.recording.rows import Row

    Fault = Callable[[nn.Module], AbstractContextManager[object]]

STEPS, BROKEN = 4, (2, 3)
"""Of so many steps, these find the weight broken."""
NAME = "layers.1.value"


def acting(model: nn.Module) -> Any:
    """The module of the weight that breaks, adapter or not."""
    (found,) = [m for n, m in model.named_modules() if n.removeprefix("base_model.model.") == NAME]
    return found


def replaced(by: Callable[[torch.Tensor], torch.Tensor | None]) -> Fault:
    """Another parameter in the weight's place, or none."""

    @contextmanager
    def fault(model: nn.Module) -> Iterator[None]:
        parameters = acting(model)._parameters
        weight, new = parameters["weight"], by(parameters["weight"])
        parameters["weight"] = None if new is None else nn.Parameter(new)
        try:
            yield
        finally:
            parameters["weight"] = weight

    return fault


def raising(where: Any, name: str, error: Exception, only: str = "") -> Fault:
    """An error where something is called, for the weight that breaks or for all."""

    def fault(model: nn.Module) -> AbstractContextManager[object]:
        original, broken = getattr(where, name), acting(model)

        def called(*args: Any, **kwargs: Any) -> Any:
            if only and getattr(args[0], only, None) is not broken:
                return original(*args, **kwargs)
            raise error

        return mock.patch.object(where, name, called)

    return fault


def disk_full(step: int) -> AbstractContextManager[object]:
    """The rows of a step cannot be written, whenever that is: on a GPU beside the training."""
    original = RecordedRows.add

    def add(self: RecordedRows, rows: Sequence[Row]) -> None:
        if rows[0]["step"] == step:
            raise OSError("disk full")
        original(self, rows)

    return mock.patch.object(RecordedRows, "add", add)


def without_room(rows: int) -> Fault:
    """No memory for the sums of weights of so many rows, alone or among others."""
    original = _kernels.dense_sums_of_all

    def summed(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        if any(len(before) == rows for before, _ in pairs):
            raise MemoryError("no room for these sums")
        return original(pairs)

    return lambda _: mock.patch.object(shares, "dense_sums_of_all", summed)


class Run:
    """A recorded training on all processes, in which things break on some of them."""

    def __init__(self, device: str, method: str, **options: Any) -> None:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        if "PiSSA" in method:
            options["baseline"] = dd.capture_baseline(net(device), TARGETS)
        self.by_tp = method == "tensor parallel"
        if self.by_tp:
            self.model: nn.Module = net(device, torch.float64, values=2 * mesh.size())
            by_tp(self.model, mesh)
        else:
            self.model = adapted(net(device), method)
            by_fsdp(self.model, mesh)
        self.optimizer = optimizer_of(self.model)
        self.options = options
        self.losses: list[float] = []
        self.said: list[str] = []

    def train(self, *, steps: Sequence[int] = range(STEPS)) -> None:
        for step in steps:
            loss = step_with(self.model, self.optimizer, step, alike=self.by_tp)
            self.losses.append(loss)

    def record(
        self, fault: Fault | None = None, *, ranks: Sequence[int] = (1,), at: Sequence[int] = BROKEN
    ) -> pd.DataFrame:
        """Train; while these steps are recorded, the fault is there on these processes."""
        recorder = dd.Recorder(self.model, TARGETS, **{"every": 1, **self.options})
        present: list[AbstractContextManager[object]] = []
        step = 0

        def begin(*_: object) -> None:
            nonlocal step
            step += 1
            if fault is not None and step in at and dist.get_rank() in ranks:
                present.append(fault(self.model))
                present[-1].__enter__()

        def end(*_: object) -> None:
            if present:
                recorder._recording.wait()  # on a GPU rows are made beside the training
                present.pop().__exit__(None, None, None)

        self.optimizer.register_step_post_hook(begin)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with recorder.attach(self.optimizer):
                    self.optimizer.register_step_post_hook(end)
                    self.train()
            finally:
                end()
                self.said = [str(warning.message) for warning in caught]
        return recorder.trajectory


def rows_are_right(found: pd.DataFrame, healthy: pd.DataFrame, broken: Sequence[str]) -> None:
    """What could not be measured is NaN for these steps; all else is as ever."""
    lost = found["step"].isin(BROKEN) & found["site"].str.endswith(tuple(broken))
    assert (
        lost.sum()
        == len(BROKEN) * healthy["site"].drop_duplicates().str.endswith(tuple(broken)).sum()
    )
    measures = [c for c in found.columns if c.startswith(("delta", "update", "signed_delta"))]
    assert found.loc[lost, measures].isna().all(axis=None)
    assert (found.loc[lost, "non_finite"] == found.loc[lost, "units"]).all()
    found, healthy = (table.drop(columns="total_decay")[~lost] for table in (found, healthy))
    pd.testing.assert_frame_equal(found, healthy, check_exact=True)


def broken_weights(device: str) -> float:
    """A weight that one process cannot measure: NaN there and then on all, and nothing else."""
    if dist.get_world_size() < 2:
        return 0.0
    faults: dict[str, tuple[Fault, str]] = {
        "shape": (replaced(lambda w: torch.zeros(3, 5, dtype=w.dtype, device=w.device)), "shard"),
        "meta": (replaced(lambda w: w.detach().to("meta")), "meta"),
        "gone": (replaced(lambda _: None), "."),
        "unseen": (raising(Followed, "seen", RuntimeError("no such thing"), "module"), "no such"),
        "unread": (
            raising(Followed, "effective", RuntimeError("CUDA out of memory"), "module"),
            "out of memory",
        ),
    }
    methods = ["FT", "DoRA", "tensor parallel"] + ["PiSSA PEFT DoRA"] * HAS_PEFT
    if IS_CAMPAIGN:
        methods += ["LoRA", "PEFT LoRA", "PEFT DoRA"][: 3 if HAS_PEFT else 1]
    unwatched = Run(device, "FT")
    unwatched.train()
    for method in methods:
        healthy_run = Run(device, method)
        healthy = healthy_run.record()
        assert not [s for s in healthy_run.said if "recorder" in s or "measured" in s]
        if method == "FT":
            assert healthy_run.losses == unwatched.losses
        some = faults if method == "FT" else {"unread": faults["unread"]}
        for i, (fault, why) in enumerate(some.values()):
            for rank in (0, 1) if IS_CAMPAIGN else ((i + 1) % 2,):
                run = Run(device, method)
                found = run.record(fault, ranks=[rank])
                assert run.losses == healthy_run.losses
                rows_are_right(found, healthy, [NAME])
                told_of = [s for s in run.said if "cannot be measured" in s]
                if dist.get_rank() == rank:
                    (one,) = told_of
                    assert why in one
                elif dist.get_rank() == 0:
                    (one,) = told_of
                    assert "process 1 cannot, and says why" in one
                else:
                    assert not told_of
    return 0.0


def broken_recorders(device: str) -> float:
    """One process's recorder fails as a whole, or at its part of the sums."""
    if dist.get_world_size() < 2:
        return 0.0
    healthy_run = Run(device, "FT")
    healthy = healthy_run.record()
    boom = RuntimeError("it broke")
    everything = TARGETS
    own_rows = -(-7 // dist.get_world_size())  # of value, whose seven rows do not divide
    for fault, broken, why in (
        (raising(Baselines, "expose", boom), everything, "it broke"),
        (raising(Watch, "look_again", boom), everything, "it broke"),
        (raising(Measuring, "_whole", boom), [], ""),
        (without_room(own_rows), ["value"], "no room"),
    ):
        run = Run(device, "FT")
        found = run.record(fault, ranks=(0,))
        assert run.losses == healthy_run.losses
        rows_are_right(found, healthy, broken)
        if dist.get_rank() == 0 and broken:
            assert sum(why in said for said in run.said) == 1, run.said
    # W_0 is lost on one process as training begins, and Λ later
    for place, name, method in (
        (Baselines, "before_step", "DoRA"),
        (Watch, "add_decay", "FT"),
    ):
        unwatched = Run(device, method)
        unwatched.train()
        with mock.patch.object(place, name, side_effect=boom) if dist.get_rank() else nothing():
            run = Run(device, method)
            found = run.record()
        assert run.losses == unwatched.losses
        later = found["step"] > 0
        assert found.loc[later, "update_norm"].isna().all() == (name == "before_step")
        assert not found.loc[~later, "update_norm"].isna().any()
    # a schedule that fails, on all
    run = Run(device, "FT", every=lambda step: 1 / (3 - step) > -2)
    found = run.record()
    assert run.losses == healthy_run.losses
    assert sorted(set(found["step"])) == [0, 1, 2, STEPS]
    assert sum("division by zero" in said for said in run.said) == 1
    return 0.0


def strict_failures(device: str) -> float:
    """With `strict` all processes raise, at the same step, and none is left waiting."""
    if dist.get_world_size() < 2:
        return 0.0
    boom = RuntimeError("it broke")
    for fault, error in (
        (raising(Followed, "effective", boom, "module"), RuntimeError),
        (raising(Watch, "look_again", boom), RuntimeError),
        (without_room(-(-7 // dist.get_world_size())), MemoryError),
        (None, OSError),
    ):
        for rank in (0, 1)[: 1 if error is MemoryError else 2]:  # the second has fewer rows
            run = Run(device, "FT", strict=True)
            met: BaseException | None = None
            disk_fails = fault is None and dist.get_rank() == rank
            try:
                with disk_full(step=2) if disk_fails else nothing():
                    run.record(fault, ranks=(rank,), at=(2,))
            except Exception as raised:
                met = raised
            steps = told((type(met).__name__, len(run.losses)))
            assert len(set(steps)) == 1, steps
            assert isinstance(met, error), steps
    with (
        mock.patch.object(Baselines, "before_step", side_effect=boom)
        if dist.get_rank()
        else nothing()
    ):
        run, met = Run(device, "DoRA", strict=True), None
        try:
            run.record()
        except Exception as raised:
            met = raised
        assert isinstance(met, RuntimeError)
        assert len(run.losses) == 0
    return 0.0


def other_adapters(device: str) -> float:
    """Adapters of another rank: measured at once where all processes change, else left out."""
    if not HAS_PEFT or dist.get_world_size() < 2:
        return 0.0
    from peft import LoraConfig

    plain: Any = net(device)
    model: Any = adapted(plain, "PEFT DoRA")
    model.add_adapter("wide", LoraConfig(target_modules=TARGETS, r=5, init_lora_weights=False))
    twin = Twin(model, lambda m: dd.Recorder(m, TARGETS, method="DoRA"))
    whole: Any = twin.model
    by_fsdp(model, init_device_mesh(device, (dist.get_world_size(),)))
    recorder = dd.Recorder(model, TARGETS, every=1, method="DoRA")
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    adapters = {1: ["default"] * 2, 2: ["wide"] * 2, 3: ["wide", "default"], 4: ["default"] * 2}
    twin.follow(model, 0)
    with warnings.catch_warnings(record=True), recorder.attach(optimizer):
        for step, names in adapters.items():
            model.set_adapter(names[min(dist.get_rank(), 1)])
            if len(set(names)) == 1:
                whole.set_adapter(names[0])
                twin.follow(model, step)
            optimizer.step()
    table = recorder.trajectory
    differ = table["step"] == 3
    assert table[differ]["delta_magnitude"].isna().all()
    return table_difference(table[~differ], twin.recorder.trajectory)


def refused_by_the_disk(device: str) -> float:
    """A full disk and a folder that is removed: training goes on, and no row is lost."""
    healthy_run = Run(device, "FT", run="run")
    healthy = healthy_run.record()
    with one_folder() as folder:
        for name, fault in (("removed", removed), ("full", full_disk)):
            place = folder / name / "run"
            run = Run(device, "FT", run_dir=place)
            found = run.record(fault(place), ranks=(0,))
            assert run.losses == healthy_run.losses
            pd.testing.assert_frame_equal(found, healthy, check_exact=True)
            dist.barrier()
            pd.testing.assert_frame_equal(dd.load_runs(place), healthy, check_exact=True)
            told_of = [said for said in run.said if str(place) in said]
            assert len(told_of) == (dist.get_rank() == 0), run.said
    return 0.0


def removed(place: Path) -> Fault:
    """The folder is removed."""

    @contextmanager
    def fault(_: nn.Module) -> Iterator[None]:
        shutil.rmtree(place, ignore_errors=True)
        yield

    return fault


def full_disk(place: Path) -> Fault:
    """No file of this process grows beyond what the table takes."""

    @contextmanager
    def fault(_: nn.Module) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (place / "trajectory.csv").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return fault


def ended_alone(device: str) -> float:
    """Training ends by an error on one process: it gets out, and waits for no other."""
    if dist.get_world_size() < 2:
        return 0.0
    with one_folder() as folder:
        for where in (0, 1):
            run = Run(device, "FT", run_dir=folder / f"{where}" / "run")
            recorder = dd.Recorder(run.model, TARGETS, every=2, **run.options)
            try:
                with recorder.attach(run.optimizer):
                    run.train(steps=range(3))
                    if dist.get_rank() == where:
                        raise KeyError("out of data")
                    recorder._watch.end()  # the others go on, with something else
                    raise InterruptedError
            except (KeyError, InterruptedError):
                pass
            dist.barrier()
            assert sorted(set(dd.load_runs(folder / f"{where}" / "run")["step"])) == [0, 2]
    return 0.0
