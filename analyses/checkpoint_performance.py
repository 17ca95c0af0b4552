"""Run: `python -m analyses.checkpoint_performance [--quick] [--gigabytes 8]` (minutes).

How long `compare_checkpoints` takes for a pair of bf16 checkpoints in the page cache, beside `cat`
of the same files; how much memory it adds; and which bytes it reads for one weight of many.

Each round runs `cat`, the core install's path and that of the extra `fast`, one after the other,
each in a process of its own that has warmed up on a small pair. `ratio` is the median over rounds
of the seconds of a round over those of its `cat`, `spread` half the interquartile range of that.
`anonymous_mb` is the peak of anonymous memory above what the process held before: mapped files do
not count, they are the page cache's. For the last row the files are first dropped from the page
cache; `read_mb` is then what the kernel fetched from the disk, which reads ahead by
`read_ahead_mb` around and behind what is asked for.

Writes analyses/results/checkpoint_performance.csv. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from analyses._tables import version
from dora_dynamics.provenance import machine, versions

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED: Final = 0
SHAPE: Final = (8192, 4096)
BASE: Final = "base.safetensors"
TUNED: Final = "tuned.safetensors"
TARGETS: Final = {"core": 5.0, "fast": 3.0}
"""How many times `cat` each may take."""
MEMORY_TARGET: Final = 200.0
"""Megabytes of anonymous memory that a comparison may add, whatever the checkpoint's size."""


def write_pair(folder: Path, gigabytes: float, shape: tuple[int, int] = SHAPE) -> list[Path]:
    """Two safetensors files of together this size: a base and the same moved in its last bits."""
    random = np.random.default_rng(SEED)
    count, shift = shape[0] * shape[1], 4096
    layers = max(1, round(gigabytes * 1e9 / 2 / (2 * count)))
    bits = random.integers(0, 1 << 16, count + shift * layers, dtype=np.uint16)
    block = (bits & np.uint16(0x83FF)) | np.uint16(0x3C00)  # about 0.008 to 2, no NaN
    moved = block ^ random.integers(0, 2, block.size, dtype=np.uint16)
    header: dict[str, dict[str, object]] = {}
    for layer in range(layers):
        place = [2 * count * layer, 2 * count * (layer + 1)]
        header[f"layers.{layer}.self_attn.q_proj.weight"] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": place,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / BASE, folder / TUNED]
    for path, values in zip(files, (block, moved), strict=True):
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for layer in range(layers):
                file.write(values[shift * layer : shift * layer + count].data)
            file.flush()
            os.fsync(file.fileno())
    return files


def drop_from_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to forget these files; some file systems do not."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_ahead(file: Path) -> float:
    """Bytes that the kernel reads ahead on the file's disk; NaN where it does not tell."""
    device = os.stat(file).st_dev  # noqa: PTH116
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (disk / "queue", disk.resolve().parent / "queue"):
        if (queue / "read_ahead_kb").is_file():
            return 1024 * float((queue / "read_ahead_kb").read_text())
    return np.nan


def counter(file: str, key: str) -> int:
    """The number behind a key of a file below /proc/self."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(f"no {key} in /proc/self/{file}")


def measured(
    folder: Path, path: str, targets: list[str] | None, jobs: int | None
) -> dict[str, float]:
    """Compare the pair in `folder` in this process, and watch it."""
    if path == "core":
        sys.modules["numba"] = None  # type: ignore[assignment]  # as if it were not installed
    from dora_dynamics import compare_checkpoints

    compare_checkpoints(folder / "small" / BASE, folder / "small" / TUNED, jobs=jobs)
    before = most = counter("status", "RssAnon:")
    done = threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, counter("status", "RssAnon:"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    read, cpu, start = counter("io", "read_bytes:"), time.process_time(), time.perf_counter()
    table = compare_checkpoints(folder / BASE, folder / TUNED, targets, jobs=jobs)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    read = counter("io", "read_bytes:") - read
    done.set()
    sampler.join()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "anonymous_mb": (most - before) * 1024 / 1e6,
        "weights": len(table),
        "chosen_mb": table.attrs["summary"]["bytes"] / 1e6,
        "read_mb": read / 1e6,
        "delta_magnitude": float(table["delta_magnitude"].mean()),
    }


def in_process(folder: Path, path: str, *options: str) -> dict[str, float]:
    """`measured` in a process of its own."""
    command = [sys.executable, "-m", "analyses.checkpoint_performance", "--measure", path]
    done = subprocess.run(
        [*command, "--folder", str(folder), *options], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def cat(files: Sequence[Path]) -> float:
    """Seconds of `cat` of the files."""
    start = time.perf_counter()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def benchmark(folder: Path, gigabytes: float, rounds: int, jobs: int | None) -> pd.DataFrame:
    """One row per way, over all weights and over one of them."""
    write_pair(folder / "small", 0.1)
    files = write_pair(folder, gigabytes)
    options = [] if jobs is None else ["--jobs", str(jobs)]
    paths = ["core", "fast"] if version("numba") else ["core"]
    cat(files)
    seconds: list[float] = []
    found: dict[str, list[dict[str, float]]] = {path: [] for path in paths}
    for _ in range(rounds):
        seconds.append(cat(files))
        for path in paths:
            found[path].append(in_process(folder, path, *options))
    size = sum(file.stat().st_size for file in files) / 1e6
    rows: list[dict[str, Any]] = [
        {"weights": "all", "path": "cat", "seconds": np.median(seconds), "mb": size}
    ]
    for path, results in found.items():
        ratios = [one["seconds"] / base for one, base in zip(results, seconds, strict=True)]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rows.append(
            {
                "weights": "all",
                "path": path,
                **{k: np.median([one[k] for one in results]) for k in ("seconds", "cpu_seconds")},
                "ratio": middle,
                "spread": (high - low) / 2,
                "target": TARGETS[path],
                "anonymous_mb": max(one["anonymous_mb"] for one in results),
                "mb": size,
                "chosen_mb": results[0]["chosen_mb"],
            }
        )
    drop_from_cache(files)
    one = in_process(folder, "core", "--targets", "layers.0.self_attn.q_proj", *options)
    kept = {name: one[name] for name in ("seconds", "cpu_seconds", "anonymous_mb", "chosen_mb")}
    read = one["read_mb"] or np.nan  # a file system in memory reads nothing
    kept |= {"mb": size, "read_mb": read, "read_ahead_mb": read_ahead(files[0]) / 1e6}
    rows.append({"weights": "one", "path": "core", **kept})
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes the table and prints it."""
    parser = argparse.ArgumentParser(prog="python -m analyses.checkpoint_performance")
    parser.add_argument("--quick", action="store_true", help="a small pair, to see that it runs")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="both files together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=None, help="threads (default: as compare)")
    parser.add_argument("--folder", type=Path, default=None, help="where the pair is written")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in (default: .)")
    parser.add_argument("--measure", choices=tuple(TARGETS), help=argparse.SUPPRESS)
    parser.add_argument("--targets", action="append", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measured(options.folder, options.measure, options.targets, options.jobs)))
        return
    size, rounds = (0.3, 1) if options.quick else (options.gigabytes, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = benchmark(Path(folder), size, rounds, options.jobs)
    found = versions() | {"numba": version("numba")}
    table = table.assign(rounds=rounds, machine=machine(), seed=SEED, versions=json.dumps(found))
    results = options.out / "analyses" / "results"
    results.mkdir(parents=True, exist_ok=True)
    table.to_csv(results / "checkpoint_performance.csv", index=False, float_format="%.6g")
    print(table.drop(columns=["machine", "seed", "versions"]).to_string(index=False))


if __name__ == "__main__":
    main()
