"""Write a pair of large safetensors files of random bf16, and watch a comparison of them.

python tests/checkpoints/big_pair.py write FOLDER GIGABYTES
python tests/checkpoints/big_pair.py watch FOLDER [jobs]
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROWS, COLUMNS = 8192, 4096


def write(folder: Path, gigabytes: float) -> None:
    """Two files of together about this size; the second is the first, moved a little."""
    layers = max(1, round(gigabytes * 1e9 / 2 / (ROWS * COLUMNS * 2)))
    random = np.random.default_rng(0)
    count = ROWS * COLUMNS + 4096 * layers
    bits = random.integers(0, 1 << 16, count, dtype=np.uint16)
    block = (bits & np.uint16(0x83FF)) | np.uint16(0x3C00)  # about 0.008 to 2, no NaN
    moved = block ^ random.integers(0, 2, count, dtype=np.uint16)
    size = ROWS * COLUMNS * 2
    header = json.dumps(
        {
            f"layers.{layer}.self_attn.q_proj.weight": {
                "dtype": "BF16",
                "shape": [ROWS, COLUMNS],
                "data_offsets": [layer * size, (layer + 1) * size],
            }
            for layer in range(layers)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("base", block), ("tuned", moved)):
        with (folder / f"{name}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for layer in range(layers):
                start = layer * 4096
                file.write(values[start : start + ROWS * COLUMNS].data)


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def watch(folder: Path, jobs: int = 1) -> dict[str, float]:
    """Compare the pair and measure the anonymous memory it adds, and the seconds."""
    from dora_dynamics.checkpoints import compare_checkpoints

    write(folder / "small", 0.1)
    small = folder / "small"
    compare_checkpoints(small / "base.safetensors", small / "tuned.safetensors", jobs=jobs)
    before = most = anonymous()
    done = threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    table = compare_checkpoints(
        folder / "base.safetensors", folder / "tuned.safetensors", jobs=jobs
    )
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return {
        "extra_anonymous": most - before,
        "seconds": seconds,
        "rows": len(table),
        "delta_magnitude": float(table["delta_magnitude"].mean()),
    }


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        print(json.dumps(watch(Path(sys.argv[2]), *map(int, sys.argv[3:]))))
