"""Checkpoints of several processes, and those that are on the hub."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dora_dynamics.checkpoints import CheckpointError, compare_checkpoints

from .models import bert, check, nudge, state

FSDP = Path(__file__).with_name("fsdp_save.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_shards_of_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "checkpoint-8" / "pytorch_model_fsdp_0"
    ranks = [
        subprocess.Popen([sys.executable, str(FSDP), str(rank), str(folder), str(port)])
        for rank in (0, 1)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
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


def test_hub_names_go_through_huggingface_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    bert().save_pretrained(tmp_path / "base")
    nudge(bert()).save_pretrained(tmp_path / "tuned")
    asked = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
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
