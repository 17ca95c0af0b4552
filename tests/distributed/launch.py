"""Run: `torchrun --nproc-per-node 2 -m tests.distributed.launch [--device cuda]`.

What the recorder sees of sharded weights, against the same weights whole. Without torchrun,
`python -m tests.distributed.launch --worlds 2 4` starts the processes itself, over gloo: it imports
once and forks, because imports are most of what such small cases cost.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from tests.conftest import IS_CAMPAIGN, PATIENCE
from tests.distributed import failures, lifecycle, placements, recording, trainers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd

CASES: dict[str, Callable[[str], float]] = {
    "dense": placements.dense_weights,
    "low rank": placements.low_rank_weights,
    "fsdp": recording.fsdp,
    "tensor parallel": recording.tensor_parallel,
    "two dimensions": recording.two_dimensions,
    "hybrid": recording.hybrid,
}
LIFECYCLE: dict[str, Callable[[str], float]] = {
    "made early": lifecycle.made_early,
    "loaded by the first": lifecycle.loaded_by_the_first,
    "resumed": lifecycle.resumed,
    "refusals": lifecycle.refusals,
}
FAILURES: dict[str, Callable[[str], float]] = {
    "broken weights": failures.broken_weights,
    "broken recorders": failures.broken_recorders,
    "strict failures": failures.strict_failures,
    "other adapters": failures.other_adapters,
    "refused by the disk": failures.refused_by_the_disk,
    "ended alone": failures.ended_alone,
}


def run_all(device: str, only: str | None = None) -> bool:
    """Runs the cases on this process, up to one that fails: the others may be waiting there."""
    world = dist.get_world_size()
    cases = CASES | (LIFECYCLE if world <= 2 or IS_CAMPAIGN else {})
    cases |= FAILURES if world == 2 or IS_CAMPAIGN else {}
    chosen = {name: case for name, case in cases.items() if only is None or only in name}
    return all(run_case(name, case, device) for name, case in chosen.items())


def run_case(name: str, case: Callable[[str], float], device: str) -> bool:
    """Whether a case agrees to 1e-6."""
    begin = time.process_time()
    try:
        worst = case(device)
        passed = worst < 1e-6
        said = f"largest relative difference {worst:.1e}"
    except Exception:
        passed, said = False, traceback.format_exc()
    if dist.get_rank() == 0 or not passed:
        word, spent = "ok" if passed else "FAILED", time.process_time() - begin
        print(f"{name}: {word}, {said} ({spent:.1f} s)", flush=True)
    return passed


def worker(
    rank: int, world: int, store: str, only: str | None, expected: Mapping[str, pd.DataFrame]
) -> None:
    """One of the processes that `--worlds` starts, with the environment that torchrun gives."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}"}
    os.environ |= {"LOCAL_WORLD_SIZE": f"{world}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{store}")
    good = run_all("cpu", only)
    if good and expected and world == 2:
        good = run_case("trainers", lambda _: trainers.one_run_for_all(expected), "cpu")
    end(good)


def end(good: bool) -> NoReturn:
    """The end of a process; see tests/torchrun.py. One that failed waits for nobody."""
    if good:
        dist.barrier()
    sys.stdout.flush()
    os._exit(0 if good else 1)


def main() -> None:
    """Starts the processes, or is one of torchrun's."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.launch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worlds", type=int, nargs="+", help="numbers of processes to start")
    parser.add_argument("--only", help="a part of a case's name")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.worlds is None:
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        end(run_all(options.device, options.only))
    expected: dict[str, pd.DataFrame] = {}
    if trainers.AVAILABLE and 2 in options.worlds and options.only in (None, "trainers"):
        with tempfile.TemporaryDirectory() as folder:
            expected = trainers.on_one_process(Path(folder))
    if recording.HAS_PEFT:  # what it imports when it is first used
        recording.adapted(recording.net("cpu"), "PEFT DoRA")
    processes = torch.multiprocessing.get_context("fork")
    good = True
    for world in options.worlds:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{world} processes", flush=True)
            store = str(Path(folder) / "store")
            started = [
                processes.Process(target=worker, args=(rank, world, store, options.only, expected))
                for rank in range(world)
            ]
            for process in started:
                process.start()
            deadline = time.monotonic() + PATIENCE
            while any(p.is_alive() for p in started) and time.monotonic() < deadline:
                if any(p.exitcode for p in started):
                    break
                time.sleep(0.05)
            for process in started:
                process.terminate()
                process.join()
            good &= all(process.exitcode == 0 for process in started)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
