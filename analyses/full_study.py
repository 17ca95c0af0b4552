r"""Run: `python -m analyses.full_study --data pairs.jsonl` (about 20 minutes on two H100s).

The study at full strength: the commands with which the results in analyses/results/ were made.
`--list` prints them. The commands of a queue run one after the other, the queues side by side, in
turn on the GPUs that there are. `--parts` runs some of the parts only: `--parts speed` needs no
data, and a machine on which nothing else runs.

The pairs of the committed results were written by

    python -m analyses.finetuning.docstrings --out pairs.jsonl --per-package 2500 \
        --packages python torch numpy scipy pandas matplotlib sklearn transformers sympy \
        networkx numba mypy pip

with the packages of the extra `dev` installed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

LONG: Final = "--seeds 5 --steps 1500 --batch-size 128 --held-out 1000"
DECAY: Final = "--seeds 5 --steps 500 --batch-size 128 --held-out 1000"
SHORT: Final = "--steps 400 --batch-size 128 --held-out 1000"
BART: Final = "--model {out}/models/bart --states decoder"

PARTS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "1": (
        (
            "pretrain --shape bart --length 256 --batch-size 128 --learning-rate 0.001 "
            "--initial-std 0.02 --out {out}",
            f"reproduce {LONG} {BART} --name reproduction_bart {{common}}",
            f"reproduce {LONG} {BART} --weight-decay 0 "
            "--name reproduction_bart_no_decay {common}",
        ),
        (f"reproduce {LONG} {{minilm}} --name reproduction_minilm {{common}}",),
        (
            f"weight_decay {DECAY} {{minilm}} {{common}}",
            f"decay_placement {DECAY} {{minilm}} {{common}}",
        ),
    ),
    "2": (
        (
            f"rank --seeds 5 {SHORT} {{minilm}} {{common}}",
            f"rank --no-decay --name rank_no_decay --seeds 5 {SHORT} {{minilm}} {{common}}",
            f"heads_and_norms --seeds 3 {SHORT} {{minilm}} {{common}}",
        ),
        ("sign_map --seeds 3 --steps 300 --batch-size 128 --held-out 1000 {minilm} {common}",),
        (
            f"reproduce {LONG} {{minilm}} --weight-decay 0 "
            "--name reproduction_minilm_no_decay {common}",
        ),
        (
            "adapter_zoo --seeds 3 --steps 200 --batch-size 64 --held-out 1000 --workers 12 "
            "{minilm} {common}",
        ),
    ),
    "3": (
        (
            "update_geometry --out {out} --runs reproduction_minilm reproduction_minilm_no_decay "
            "reproduction_bart reproduction_bart_no_decay",
            "gradient_geometry --batches 64 {minilm} --out {out}",
            "merge {minilm} --out {out}",
        ),
    ),
    "speed": (  # one after the other: what runs beside them would be in their times
        (
            "observer_cost --device {device} --out {out}",
            "performance --device {device} --out {out}",
            "adapter_cost --device {device} --out {out}",
            "growth --device {device} --out {out}",
        ),
    ),
}
"""Commands by part and queue; {out}, {minilm}, {device} and {common} are filled in."""


def commands(part: str, options: argparse.Namespace) -> list[list[str]]:
    """The queues of a part, as lines of arguments behind `python -m analyses.`."""
    given = {
        "out": shlex.quote(options.out),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "minilm": f"--model {shlex.quote(options.minilm)}" if options.minilm else "",
        "common": f"--data {shlex.quote(options.data)} --out {shlex.quote(options.out)}",
    }
    return [[line.format(**given) for line in queue] for queue in PARTS[part]]


def run_queue(queue: Sequence[str], gpu: int) -> list[str]:
    """Run commands one after the other on one GPU; returns those that failed."""
    failed = []
    for line in queue:
        start = time.perf_counter()
        name = line.split()[0]
        found = subprocess.run(
            [sys.executable, "-m", f"analyses.{name}", *shlex.split(line)[1:]],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.perf_counter() - start
        print(f"[{took:.0f} s, exit {found.returncode}] {line}", flush=True)
        print(found.stdout[-1500:] if found.returncode == 0 else found.stderr[-2500:], flush=True)
        failed += [line] if found.returncode else []
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the queues of each part side by side."""
    parser = argparse.ArgumentParser(prog="python -m analyses.full_study")
    parser.add_argument("--data", default="pairs.jsonl", help="what the docstring command wrote")
    parser.add_argument("--minilm", help="folder of MiniLM where its package is not installed")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", default=".", help="folder to write in")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(argv)
    failed = []
    for part in options.parts:
        queues = commands(part, options)
        if options.list:
            print("\n".join(f"python -m analyses.{line}" for queue in queues for line in queue))
            continue
        gpus = max(1, torch.cuda.device_count())
        with ThreadPoolExecutor(len(queues)) as pool:
            places = [number % gpus for number in range(len(queues))]
            failed += [line for lines in pool.map(run_queue, queues, places) for line in lines]
    if failed:
        raise SystemExit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
