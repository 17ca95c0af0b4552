"""One comparison over several processes: the table of one process."""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch._C._distributed_c10d import TCPStore
from torch.distributed.checkpoint.state_dict_saver import save

import dora_dynamics as dd
from dora_dynamics.checkpoints.spreading import LostProcessError, Processes
from tests.torchrun import torchrun

if TYPE_CHECKING:
    from pathlib import Path


def test_work_is_shared_evenly_and_whole() -> None:
    sizes = [7, 1, 30, 4, 4, 9, 0, 28]
    shares = [Processes(rank, 3).share(sizes) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 7
    assert Processes().share(sizes) == list(range(len(sizes)))


def test_a_process_that_was_lost_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was raised for it holds no group, whose threads could abort the process."""

    class Group:
        pass

    groups = [Group()]
    of_group = weakref.ref(groups[0])

    def broken(*_: object) -> None:
        held = groups[0]
        raise RuntimeError(f"Connection closed by peer\n{type(held)}")

    monkeypatch.setattr(torch.distributed, "all_gather_object", broken)
    with pytest.raises(LostProcessError, match=r"has ended \(Connection closed by peer\)") as lost:
        Processes(0, 2).each(lambda: None)
    assert lost.value.__context__ is None
    groups.clear()
    assert of_group() is None


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_torchrun_compares_as_one_process(tmp_path: Path) -> None:
    """A file and distributed checkpoints, begun and resumed; what only some processes see."""
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
    dd.compare_checkpoints(
        tmp_path / "base.safetensors", checkpoints[0], ["query", "value"], out=tmp_path / "resumed"
    )
    begun = tmp_path / "resumed" / "trajectory.csv"
    lines = begun.read_bytes().splitlines(keepends=True)
    next_ones = [line.replace(b",10,", b",20,", 1) for line in lines[1:4]]
    begun.write_bytes(b"".join([*lines, *next_ones[:2], next_ones[2][:40]]))  # killed among rows
    bad = dict(base)
    bad["layers.2.v_proj.weight"] = torch.full((7, 7), torch.nan)
    save_file(bad, tmp_path / "bad.safetensors")

    shutil.copytree(tmp_path / "step-20", tmp_path / "damaged")
    (shard,) = (tmp_path / "damaged").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[-600:] = bytes(600)
    shard.write_bytes(content)

    spread = ["base.safetensors", "step-10", "step-20", "--targets", "query,value"]
    codes, said, errors = compared_by_two(
        tmp_path,
        [*spread, "--out", "spread"],
        [*spread, "--out", "resumed", "--resume"],
        ["base.safetensors", "bad.safetensors", "--out", "none"],
        ["base.safetensors", "damaged", "--out", "none"],
    )
    assert codes == [[0, 0, 2, 2]] * 2, errors
    pd.testing.assert_frame_equal(dd.load_runs(tmp_path / "spread"), expected)
    pd.testing.assert_frame_equal(
        dd.load_runs(tmp_path / "resumed"), expected.assign(run="resumed")
    )
    assert said[0].count("Wrote 12 rows") == 2
    assert not said[1]
    assert errors[0].count("holds NaN or Inf in 7 of 7 units of layers.2.v_proj") == 1
    assert errors[0].count("is damaged") == 1
    assert "Error" not in errors[1]
    assert not (tmp_path / "none").exists()


def compared_by_two(
    folder: Path, *commands: list[str]
) -> tuple[list[list[int]], list[str], list[str]]:
    """Each command as `torchrun … -m dora_dynamics` runs it; imports are paid once a process.

    Torchrun's own port serves the first; the others have theirs, which this process holds.
    """
    stores = [
        TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in commands[1:]
    ]
    program = folder / "compare_all.py"
    program.write_text(PROGRAM)
    ports = [None, *(store.port for store in stores)]
    done = torchrun(
        2, str(program), json.dumps(list(zip(ports, commands, strict=True))), cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    of_ranks = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]
    codes, said, errors = zip(*of_ranks, strict=True)
    return list(codes), list(said), list(errors)


PROGRAM = """
import io, json, os, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

codes, said, errors = [], io.StringIO(), io.StringIO()
for port, command in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port or os.environ["MASTER_PORT"])
    sys.argv = ["dora-dynamics", "compare", *command]
    with redirect_stdout(said), redirect_stderr(errors):
        try:
            runpy.run_module("dora_dynamics", run_name="__main__")
        except SystemExit as error:
            codes.append(error.code or 0)
    for task in Path("/proc/self/task").glob("*/comm"):  # one could abort the process at its end
        assert "gloo" not in task.read_text(), "a thread of gloo outlives the group"
content = [codes, said.getvalue(), errors.getvalue()]
Path(f"said-{os.environ['RANK']}.json").write_text(json.dumps(content))
"""
