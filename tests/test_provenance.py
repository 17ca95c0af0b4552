"""Where a result comes from; CUDA is asked only where it is in use already."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
import torch

from dora_dynamics import provenance
from tests.conftest import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, folder: Path, *models: str) -> None:
    """A machine with GPUs, seen from a process that must not touch CUDA."""

    def refuse() -> str:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_name", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(provenance, "_DRIVER", folder)
    for number, model in enumerate(models):
        (folder / f"0000:{number:02}:00.0").mkdir()
        told = f"Model: \t\t {model}\nIRQ:   \t\t 250\nGPU UUID: \t GPU-1\n"
        (folder / f"0000:{number:02}:00.0" / "information").write_text(told)


@pytest.mark.parametrize(
    ("count", "models", "said"),
    [
        (2, ["NVIDIA H100 80GB HBM3"] * 2, "NVIDIA H100 80GB HBM3"),
        (2, ["Tesla T4", "NVIDIA A10"], "NVIDIA A10 or Tesla T4"),
        (1, [], "a GPU"),
        (0, ["NVIDIA H100 80GB HBM3"], "no GPU"),  # it is there, and not visible to the process
    ],
)
def test_a_gpu_is_named_without_cuda(
    count: int, models: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus(monkeypatch, count, tmp_path, *models)
    assert provenance.machine().split(" cores, ")[1] == said


def test_a_gpu_in_use_is_the_one_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus(monkeypatch, 2, tmp_path, "Tesla T4", "NVIDIA A10")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A10")
    assert provenance.machine().endswith(" cores, NVIDIA A10")


@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
@pytest.mark.parametrize("first", ["the child", "the parent"])
def test_recorders_of_forked_processes(first: str) -> None:
    """A recorder leaves CUDA to the children of its process, and does without where it is lost."""
    program = f"""
        import os
        import torch
        import dora_dynamics as dd
        from dora_dynamics.provenance import machine

        if {first == "the parent"}:
            torch.zeros(1, device="cuda")
        recorder = dd.Recorder(torch.nn.Sequential(torch.nn.Linear(3, 2)), ["0"])
        assert torch.cuda.is_initialized() == {first == "the parent"}
        child = os.fork()
        if child == 0:
            dd.Recorder(torch.nn.Sequential(torch.nn.Linear(3, 2)), ["0"])
            print(machine(), flush=True)
            if {first == "the child"}:
                assert torch.ones(1, device="cuda").item() == 1
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(machine())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    in_child, in_parent = done.stdout.splitlines()
    assert "no GPU" not in in_child + in_parent, done.stdout
