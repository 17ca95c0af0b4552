"""A recorded training in forked children that are killed: `python -m tests.robustness.killed`.

Forking costs milliseconds where starting Python and torch costs seconds, so that hundreds of kills
are tried in a minute. A child is killed with SIGKILL at a random moment, or at one of the moments
at which it touches a file of its run (each `open`, `rename`, `remove` and `truncate`), or in the
middle of a write.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dora_dynamics as dd

STEPS = 12
EVERY = 2
SAVE = 3


def train(folder: Path) -> None:
    """Train from the last checkpoint, or from the start, to the end."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"query": nn.Linear(9, 6), "value": nn.Linear(9, 5)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    run, checkpoint = folder / "run", folder / "checkpoint.pt"
    options: dict[str, Any] = {"every": EVERY, "run_dir": run, "keep": ["units"], "run": "run"}
    first = 1
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        recorder = dd.Recorder(model, ["query", "value"], resume=saved["recorder"], **options)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = recorder.step + 1
    else:
        recorder = dd.Recorder(model, ["query", "value"], overwrite=True, **options)
    with recorder.attach(optimizer):
        for step in range(first, STEPS + 1):
            source = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            x = torch.randn(3, 9, generator=source)
            loss = model["query"](x).square().sum() + model["value"](x).square().sum()
            torch.autograd.backward(loss)
            optimizer.step()
            if step % SAVE == 0:
                parts: dict[str, Any] = {
                    "model": model,
                    "optimizer": optimizer,
                    "recorder": recorder,
                }
                partial = checkpoint.with_suffix(".partial")
                torch.save({name: part.state_dict() for name, part in parts.items()}, partial)
                partial.replace(checkpoint)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: int, folder: Path) -> None:
    """Be killed when files of the run are touched for the `moment`-th time, before that happens."""
    left = moment

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir") and str(
            folder / "run"
        ) in str(arguments[0]):
            left -= 1
            if left == 0:
                die()

    sys.addaudithook(watch)


def die_in_write(moment: int, share: float) -> None:
    """Be killed when a part of the `moment`-th write of rows is on disk."""
    write, left = os.pwrite, moment

    def torn(descriptor: int, content: Any, offset: int) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            write(descriptor, bytes(content)[: int(share * len(content))], offset)
            die()
        return write(descriptor, content, offset)

    os.pwrite = torn


def child(folder: Path, kill: tuple[str, float] | None) -> bool:
    """Train in a child that is killed so; whether it was, before its end."""
    pid = os.fork()
    if pid == 0:
        try:
            if kill is not None and kill[0] == "touch":
                die_at(int(kill[1]), folder)
            if kill is not None and kill[0] == "write":
                die_in_write(int(kill[1]), kill[1] % 1)
            train(folder)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    if kill is not None and kill[0] == "time":
        time.sleep(kill[1])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise SystemExit(f"the training failed, killed as {kill}")
    return False


def main() -> None:
    """Arguments: folder, kills, seed. Each life of a training may be ended by one kill or more."""
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)
    whole = folder / "uninterrupted"
    whole.mkdir()
    train(whole)  # here, so that children find all imported
    begun = time.monotonic()
    (folder / "timed").mkdir()
    child(folder / "timed", None)
    duration = time.monotonic() - begun
    expected = dd.load_runs(whole / "run")
    units = {step: dd.load_units(whole / "run", step) for step in expected["step"].unique()}
    lives, died = 0, {"time": 0, "touch": 0, "write": 0}
    while sum(died.values()) < kills:  # those that came before the end of the training
        life = folder / f"life-{lives}"
        life.mkdir()
        lives += 1
        for _ in range(rng.choice((1, 1, 2, 4))):
            kind = rng.choice(("time", "touch", "write"))
            when = {
                "time": rng.uniform(0, 1.1 * duration),
                "touch": float(rng.randrange(1, 40)),
                "write": rng.uniform(1, 9),
            }[kind]
            died[kind] += child(life, (kind, when))
            if (life / "run" / "run.json").exists():  # else it was killed while it was made
                table = dd.load_runs(life / "run")
                assert table.equals(expected.head(len(table))), f"life {lives - 1}, {kind} {when}"
        child(life, None)
        table = dd.load_runs(life / "run")
        assert table.equals(expected), f"life {lives - 1} differs"
        for step, of_sites in units.items():
            for site, unit in dd.load_units(life / "run", step).items():
                assert (unit.one_minus_cosine == of_sites[site].one_minus_cosine).all()
        names = sorted(path.name for path in (life / "run").iterdir())
        assert names == ["run.json", "trajectory.csv", "units"], names
    print(json.dumps({"kills": died, "lives": lives, "rows": len(expected)}))


if __name__ == "__main__":
    main()
