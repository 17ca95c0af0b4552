"""One comparison over several processes: the table of one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save

import dora_dynamics as dd
from dora_dynamics.checkpoints.spreading import Processes

if TYPE_CHECKING:
    from pathlib import Path


def test_work_is_shared_evenly_and_whole() -> None:
    sizes = [7, 1, 30, 4, 4, 9, 0, 28]
    shares = [Processes(rank, 3).share(sizes) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 7
    assert Processes().share(sizes) == list(range(len(sizes)))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_torchrun_compares_as_one_process(tmp_path: Path) -> None:
    """A file and a distributed checkpoint; then one that only some processes find damaged."""
    torch.manual_seed(0)
    base = {
        f"layers.{layer}.{name}.weight": torch.randn(5 + layer, 7)
        for layer in range(3)
        for name in ("q_proj", "v_proj")
    }
    save_file(base, tmp_path / "base.safetensors")
    for step in (10, 20):
        state = {name: weight + 1e-3 * torch.randn_like(weight) for name, weight in base.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is saved by one process
            save({"model": state}, checkpoint_id=tmp_path / f"step-{step}")
    checkpoints = [tmp_path / f"step-{step}" for step in (10, 20)]
    expected = dd.compare_checkpoints(
        tmp_path / "base.safetensors", checkpoints, ["query", "value"], run="spread"
    )
    bad = dict(base)
    bad["layers.2.v_proj.weight"] = torch.full((7, 7), torch.nan)
    save_file(bad, tmp_path / "bad.safetensors")

    shutil.copytree(tmp_path / "step-20", tmp_path / "damaged")
    (shard,) = (tmp_path / "damaged").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[-600:] = bytes(600)
    shard.write_bytes(content)

    spread = ["base.safetensors", "step-10", "step-20", "--targets", "query,value"]
    codes, said, errors = torchrun(
        tmp_path,
        [*spread, "--out", "spread"],
        ["base.safetensors", "bad.safetensors", "--out", "none"],
        ["base.safetensors", "damaged", "--out", "none"],
    )
    assert codes == [[0, 2, 2]] * 2, errors
    pd.testing.assert_frame_equal(dd.load_runs(tmp_path / "spread"), expected)
    assert said[0].count("Wrote 12 rows") == 1
    assert not said[1]
    assert errors[0].count("holds NaN or Inf in 7 of 7 units of layers.2.v_proj") == 1
    assert errors[0].count("is damaged") == 1
    assert "Error" not in errors[1]
    assert not (tmp_path / "none").exists()


def torchrun(folder: Path, *commands: list[str]) -> tuple[list[list[int]], list[str], list[str]]:
    """Each command on two processes, as torchrun starts them; imports are paid once a process."""
    code = (
        "import json, os, sys\n"
        "from dora_dynamics.cli import main\n"
        "codes = []\n"
        "for port, command in json.loads(sys.argv[1]):\n"
        "    os.environ['MASTER_PORT'] = str(port)\n"
        "    sys.argv[1:] = ['compare', *command]\n"
        "    try:\n"
        "        codes.append(main() or 0)\n"
        "    except SystemExit as error:\n"
        "        codes.append(error.code or 0)\n"
        "print(codes, file=open('codes-' + os.environ['RANK'], 'w'))\n"
    )
    from torch.distributed.elastic.utils.distributed import get_free_port

    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    arguments = json.dumps([(get_free_port(), command) for command in commands])
    started: list[Any] = [
        subprocess.Popen(
            [sys.executable, "-c", code, arguments], cwd=folder, text=True,
            env=environment | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        spoken = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [json.loads((folder / f"codes-{rank}").read_text()) for rank in range(2)]
    return codes, [out for out, _ in spoken], [err for _, err in spoken]
