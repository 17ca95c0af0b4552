"""W_0: captured, given, read from a checkpoint, or refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch import nn

import dora_dynamics as dd
import dora_dynamics.recording.measuring
from dora_dynamics.checkpoints import CheckpointError, opening
from dora_dynamics.measurement import Measurement
from dora_dynamics.recording.baseline_source import BaselineError, CapturedBaseline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[[], nn.Module]
    Train = Callable[..., Any]

TARGETS = ["query", "value"]


def adapted(model: nn.Module, start: str | bool = True) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=start)
    return peft.get_peft_model(model, config)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def row(recorder: dd.Recorder, step: int) -> Any:
    return recorder.trajectory.query(f"step == {step} and site == 'layers.1.query'").iloc[0]


class TestCapture:
    @pytest.mark.parametrize("start", ["pissa", "olora"])
    def test_before_a_method_that_rewrites_its_base(
        self, start: str, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        before = model.get_submodule("layers.1.query").weight.detach().clone()  # type: ignore[operator]
        baseline = dd.capture_baseline(model, TARGETS)
        model = adapted(model, start)
        recorder = dd.Recorder(model, TARGETS, every=1, baseline=baseline, run_dir=tmp_path / "run")
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        assert row(recorder, 0)["delta_direction"] < 1e-10
        merged = copy.deepcopy(model).double().merge_and_unload()
        change = dd.weight_change(
            before.double(), merged.get_submodule("layers.1.query").weight.detach()
        )
        assert row(recorder, 2)["delta_direction"] == pytest.approx(
            change.delta_direction, rel=1e-6
        )
        info = json.loads((tmp_path / "run" / "run.json").read_text())
        assert info["baseline"].startswith("captured from the TinyTransformer")

    def test_of_what_the_method_already_rewrote_is_refused(self, tiny_transformer: Build) -> None:
        with pytest.raises(BaselineError, match=r"PiSSA rewrote the base weight of layers\.0"):
            dd.capture_baseline(adapted(tiny_transformer(), "pissa"), TARGETS)

    def test_owns_its_memory_and_the_recorder_lets_go_of_it(
        self, tiny_transformer: Build, train: Train
    ) -> None:
        model = tiny_transformer()
        baseline = dd.capture_baseline(model, TARGETS)
        live = {p.data_ptr() for p in model.parameters()}
        assert live.isdisjoint(weight.data_ptr() for weight in baseline.weights.values())
        model = adapted(model)
        recorder = dd.Recorder(model, TARGETS, every=1, baseline=baseline)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 1)
            held = {weight.data_ptr() for weight in recorder._baseline.weights.values()}
        assert held <= live  # equal to the frozen weights below: those are used
        assert row(recorder, 1)["update_norm"] > 0

    def test_same_rows_as_without_it(self, tiny_transformer: Build, train: Train) -> None:
        tables = []
        for captured in (False, True):
            torch.manual_seed(0)
            model = tiny_transformer()
            baseline = dd.capture_baseline(model, TARGETS) if captured else None
            dd.apply_dora(model, TARGETS, rank=2, generator=torch.Generator().manual_seed(0))
            recorder = dd.Recorder(model, TARGETS, every=1, baseline=baseline)
            optimizer = adamw(model)
            with recorder.attach(optimizer):
                train(model, optimizer, 2)
            tables.append(recorder.trajectory)
        assert tables[0].equals(tables[1])

    def test_with_fewer_targets_than_the_recorder(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        baseline = dd.capture_baseline(model, ["query"])
        with pytest.raises(BaselineError, match=r"holds no 'layers\.0\.value\.weight' \(nor 1"):
            dd.Recorder(model, TARGETS, baseline=baseline)


class TestGiven:
    def test_state_dict(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        recorder = dd.Recorder(model, TARGETS, baseline=state)
        recorder.record()
        assert row(recorder, 0)["relative_delta_magnitude"] == pytest.approx(0.5, rel=1e-6)

    @pytest.mark.parametrize("prefix", ["", "model."])
    def test_checkpoint(self, prefix: str, tiny_transformer: Build, tmp_path: Path) -> None:
        model = tiny_transformer()
        state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
        file = tmp_path / "model.safetensors"
        safetensors.torch.save_file(state, file)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        for source in (file, tmp_path, str(tmp_path)):
            recorder = dd.Recorder(model, TARGETS, baseline=source)
            recorder.record()
            assert row(recorder, 0)["relative_delta_magnitude"] == pytest.approx(0.5, rel=1e-6)
            assert str(source) in recorder._recording.info.baseline

    def test_checkpoint_below_an_adapter(
        self, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        model = tiny_transformer()
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
        model = adapted(model, "pissa")
        recorder = dd.Recorder(model, TARGETS, every=1, baseline=tmp_path)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        assert row(recorder, 0)["delta_direction"] < 1e-10
        assert row(recorder, 2)["delta_direction"] > 1e-8

    @pytest.mark.parametrize(
        ("stored", "live"),
        [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    )
    def test_of_another_precision(
        self, stored: torch.dtype, live: torch.dtype, tiny_transformer: Build
    ) -> None:
        """A narrow checkpoint is widened, a wide one rounded as the model was when loaded."""
        model = tiny_transformer().to(torch.bfloat16)
        state = {name: tensor.to(stored) for name, tensor in model.state_dict().items()}
        model = model.to(live)
        recorder = dd.Recorder(model, TARGETS, baseline=state)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            pass
        assert recorder.trajectory["update_norm"].max() == 0

    def test_of_another_shape(self, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        state = dict(model.state_dict())
        state["layers.0.query.weight"] = torch.zeros(3, 9)
        with pytest.raises(BaselineError, match=r"layers\.0\.query has the shape \(3, 9\)"):
            dd.Recorder(model, TARGETS, baseline=state)

    def test_an_adapter_is_no_baseline(self, tiny_transformer: Build, tmp_path: Path) -> None:
        model = adapted(tiny_transformer())
        model.save_pretrained(tmp_path)
        with pytest.raises(BaselineError, match="is an adapter"):
            dd.Recorder(model, TARGETS, baseline=tmp_path)

    def test_nothing_known(self, tiny_transformer: Build) -> None:
        with pytest.raises(TypeError, match="baseline must be a path"):
            dd.Recorder(tiny_transformer(), TARGETS, baseline=3)  # type: ignore[arg-type]

    def test_empty(self, tiny_transformer: Build) -> None:
        with pytest.raises(BaselineError, match=r"holds no 'layers\.0\.query\.weight'"):
            dd.Recorder(tiny_transformer(), TARGETS, baseline=CapturedBaseline({}, "Other"))


class TestPlace:
    """Where W_0 waits changes no number."""

    def recorded(
        self, tiny_transformer: Build, train: Train, device: str, **options: Any
    ) -> dd.Recorder:
        torch.manual_seed(0)
        model = tiny_transformer().to(device)
        recorder = dd.Recorder(model, TARGETS, every=1, method="FT", **options)
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 3)
        return recorder

    def test_same_rows(
        self, tiny_transformer: Build, train: Train, tmp_path: Path, device: str
    ) -> None:
        safetensors.torch.save_file(tiny_transformer().state_dict(), tmp_path / "model.safetensors")
        expected = self.recorded(tiny_transformer, train, device).trajectory
        for options in (
            {"baseline_place": "host"},
            {"baseline_place": "host", "baseline": tmp_path},
            {"baseline_place": "file", "baseline": tmp_path},
        ):
            recorder = self.recorded(tiny_transformer, train, device, **options)
            assert recorder.trajectory.equals(expected)
            for weight in recorder._baseline.weights.values():
                assert weight.device.type == "cpu"
                pinned = device == "cuda" and options["baseline_place"] == "host"
                assert weight.is_pinned() == pinned
        assert expected.query("step == 3")["delta_direction"].min() > 0

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    def test_in_the_file_it_keeps_the_dtype_of_the_file(
        self, stored: torch.dtype, tiny_transformer: Build, train: Train, tmp_path: Path
    ) -> None:
        """A wide checkpoint is rounded as the model was when loaded, but only to be measured."""
        model = tiny_transformer().to(torch.bfloat16)
        state = {
            name: tensor.to(stored) for name, tensor in tiny_transformer().state_dict().items()
        }
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        recorder = dd.Recorder(model, TARGETS, baseline=tmp_path, baseline_place="file")
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            pass
        assert recorder.trajectory["update_norm"].max() == 0
        held = recorder._baseline.weights.values()
        assert all(weight.dtype == stored for weight in held)

    def test_what_is_copied_to_be_measured_is_bounded(
        self,
        tiny_transformer: Build,
        train: Train,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Four weights that are converted for the comparison, two or one at a time."""
        state = {n: t.to(torch.bfloat16) for n, t in tiny_transformer().state_dict().items()}
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        options: dict[str, Any] = {"baseline": tmp_path, "baseline_place": "file"}
        expected = self.recorded(tiny_transformer, train, "cpu", **options).trajectory
        add = Measurement.add
        for limit, groups in ((1 << 28, 1), (2 * 9 * 6 * 4, 2), (1, 4)):
            calls: list[int] = []

            def counting(self: Measurement, weights: list[Any], calls: list[int] = calls) -> None:
                calls.append(len(weights))
                add(self, weights)

            monkeypatch.setattr(dora_dynamics.recording.measuring, "_AT_A_TIME", limit)
            monkeypatch.setattr(Measurement, "add", counting)
            recorder = self.recorded(tiny_transformer, train, "cpu", **options)
            assert recorder.trajectory.equals(expected)
            assert calls == [4 // groups] * groups * 4  # of steps 0 to 3

    def test_unknown_or_without_a_file(self, tiny_transformer: Build) -> None:
        place: Any = "disk"
        with pytest.raises(ValueError, match="must be 'device', 'host' or 'file', not 'disk'"):
            dd.Recorder(tiny_transformer(), TARGETS, baseline_place=place)
        with pytest.raises(ValueError, match="say with baseline= which"):
            dd.Recorder(tiny_transformer(), TARGETS, baseline_place="file")


class TestHub:
    """By hub name, from the hub's own cache on this machine, without a network."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        return tmp_path / "hub"

    def put(self, cache: Path, name: str, revision: str, model: nn.Module) -> Path:
        """What a download leaves: a blob, a link to it in the snapshot, a reference to that."""
        folder = cache / f"models--{name.replace('/', '--')}"
        blob = folder / "blobs" / "abc123"
        for part in (blob.parent, folder / "refs", folder / "snapshots" / self.COMMIT):
            part.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), blob)
        (folder / "refs" / revision).write_text(self.COMMIT)
        link = folder / "snapshots" / self.COMMIT / "model.safetensors"
        link.symlink_to("../../blobs/abc123")
        return link

    @pytest.mark.parametrize(
        ("name", "revision"), [("org/tiny", "main"), ("tiny-base", "main"), ("org/tiny@v1", "v1")]
    )
    def test_is_read_from_the_cache(
        self, name: str, revision: str, cache: Path, tiny_transformer: Build, train: Train,
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        file = self.put(cache, name.partition("@")[0], revision, tiny_transformer())
        read: list[str] = []
        open_whole = opening.open_checkpoint

        def noting(path: Path) -> Any:
            contents = open_whole(path)

            def load(name: str) -> torch.Tensor:
                read.append(name)
                return contents.tensors[name].load()

            noted = {
                name: replace(tensor, load=partial(load, name))
                for name, tensor in contents.tensors.items()
            }
            return replace(contents, tensors=noted)

        monkeypatch.setattr(opening, "open_checkpoint", noting)
        model = adapted(tiny_transformer(), "olora")
        recorder = dd.Recorder(model, TARGETS, every=1, baseline=name, run_dir=tmp_path / "run")
        assert sorted(read) == [
            f"layers.{layer}.{target}.weight" for layer in (0, 1) for target in TARGETS
        ]
        optimizer = adamw(model)
        with recorder.attach(optimizer):
            train(model, optimizer, 2)
        state = safetensors.torch.load_file(file)
        merged = copy.deepcopy(model).double().merge_and_unload()
        change = dd.weight_change(
            state["layers.1.query.weight"].double(),
            merged.get_submodule("layers.1.query").weight.detach(),
        )
        assert row(recorder, 0)["delta_direction"] < 1e-10
        assert row(recorder, 2)["update_norm"] == pytest.approx(change.update_norm, rel=1e-6)
        info = json.loads((tmp_path / "run" / "run.json").read_text())
        assert info["baseline"] == f"the checkpoint {name}"

    def test_that_is_not_there(self, cache: Path, tiny_transformer: Build) -> None:
        for name in ("org/tiny", "tiny-base"):
            with pytest.raises(CheckpointError, match=f"{name} is neither a path .* nor a model"):
                dd.Recorder(tiny_transformer(), TARGETS, baseline=name)


class TestRefused:
    @pytest.mark.parametrize(
        ("start", "name"), [("pissa", "PiSSA"), ("pissa_niter_2", "PiSSA"), ("olora", "OLoRA")]
    )
    def test_a_base_that_was_rewritten(
        self, start: str, name: str, tiny_transformer: Build, tmp_path: Path
    ) -> None:
        model = adapted(tiny_transformer(), start)
        with pytest.raises(BaselineError, match=rf"{name} rewrote .*capture_baseline.*checkpoint"):
            dd.Recorder(model, TARGETS, run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga"])
    def test_is_told_by_the_configuration(self, start: str, tiny_transformer: Build) -> None:
        """Their starts take more than a model; they are made in `effective/test_peft_tuners.py`."""
        model = adapted(tiny_transformer())
        model.peft_config["default"].init_lora_weights = start
        with pytest.raises(BaselineError, match="rewrote the base weight"):
            dd.Recorder(model.base_model.model, TARGETS)

    def test_an_adapter_of_another_layer_does_not_matter(self, tiny_transformer: Build) -> None:
        model = adapted(tiny_transformer(), "pissa")
        dd.Recorder(model, ["key"]).record()
