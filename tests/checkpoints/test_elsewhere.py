"""Checkpoints of several processes, and those that are on the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dora_dynamics.checkpoints import CheckpointError, compare_checkpoints, distributed
from tests.torchrun import torchrun

from .adapters import train_and_save
from .models import bert, check, nudge, state

FSDP = Path(__file__).with_name("fsdp_save.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_shards_of_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint-8" / "pytorch_model_fsdp_0"
    done = torchrun(2, str(FSDP), str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.distcp"))) == 2
    spec = importlib.util.spec_from_file_location("fsdp_save", FSDP)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = state(module.model())
    after = {name: tensor * 1.5 + 0.01 for name, tensor in before.items()}
    safetensors.torch.save_file(before, tmp_path / "base.safetensors")
    for axis in ("output", "input"):
        table = compare_checkpoints(
            tmp_path / "base.safetensors", tmp_path, ["query", "value"], axis=axis
        )
        assert list(table["step"].unique()) == [8]
        check(table, before, after, axis=axis)

    def together(shape: Any, _: Any, pieces: Any) -> Any:
        raise AssertionError(f"{len(pieces)} shards of {shape} were put together in memory")

    monkeypatch.setattr(distributed, "_assemble", together)
    table = compare_checkpoints(tmp_path / "base.safetensors", folder, ["query", "value"])
    check(table, before, after)
    with_itself = compare_checkpoints(folder, tmp_path / "checkpoint-8", ["query", "value"])
    assert list(with_itself["update_norm"]) == [0, 0]


def test_hub_names_go_through_huggingface_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    bert().save_pretrained(tmp_path / "base")
    nudge(bert()).save_pretrained(tmp_path / "tuned")
    asked = []

    def snapshot(
        repository: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: Any
    ) -> str:
        assert "consolidated*" in ignore_patterns
        asked.append((repository, revision, tuple(allow_patterns)))
        return str(tmp_path / repository.partition("/")[2])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    table = compare_checkpoints("org/base", "org/tuned@main", ["query"])
    check(table, state(bert()), state(nudge(bert())))
    assert asked == [("org/tuned", "main", ("*.json", "*.safetensors")),
                     ("org/base", None, ("*.json", "*.safetensors"))]  # fmt: skip

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"neither a path .* nor a model the hub gave"):
        compare_checkpoints("org/base", "org/tuned", ["query"])


def test_a_local_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched before is found without a network, also by a name of one word."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    commit = "a" * 40
    snapshots = {}
    for name in ("tiny", "org/tuned"):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        snapshots[name] = folder / "snapshots" / commit
        snapshots[name].mkdir(parents=True)
    bert().save_pretrained(snapshots["tiny"])
    torch.save(state(nudge(bert())), snapshots["org/tuned"] / "pytorch_model.bin")
    table = compare_checkpoints("tiny", "org/tuned", ["query"])
    check(table, state(bert()), state(nudge(bert())))
    with pytest.raises(CheckpointError, match=r"other is neither a path .* nor a model the hub"):
        compare_checkpoints("other", "org/tuned", ["query"])

    peft = pytest.importorskip("peft")
    model = bert()
    model.name_or_path = "tiny"
    train_and_save(model, peft.LoraConfig(r=2, target_modules=["query"]), tmp_path / "adapter")
    own = compare_checkpoints(None, tmp_path / "adapter")
    assert own.attrs["summary"]["base"] == str(snapshots["tiny"])
    assert own.attrs["summary"]["checkpoints"][0]["notes"] == []
