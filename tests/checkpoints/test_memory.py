"""A pair of files far larger than the memory a comparison takes, and which bytes it reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).with_name("big_pair.py")
ROOT = SCRIPT.parents[2]
BUDGET = 200_000_000


def script(*arguments: object) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT,
                          env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def large_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pair")
    script("write", folder, 3)
    yield folder
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_three_gigabytes_in_bounded_memory(large_pair: Path, jobs: int) -> None:
    size = sum(file.stat().st_size for file in large_pair.glob("*.safetensors"))
    assert size > 2.9e9
    seen = json.loads(script("watch", large_pair, jobs))
    assert seen["rows"] == 22
    assert 0 < seen["extra_anonymous"] < BUDGET


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_chosen_sites_are_read(tmp_path: Path) -> None:
    """What is mapped in counts as shared file memory: it stays below that of one weight."""
    script("write", tmp_path, 0.8)  # six weights of 67 MB in each file
    code = (
        "import sys; from pathlib import Path\n"
        "from dora_dynamics.checkpoints import compare_checkpoints as c\n"
        "def read(): return int(next(l.split()[1] for l in Path('/proc/self/io').read_text()"
        ".splitlines() if l.startswith('rchar')))\n"
        "def peak(): return int(next(l.split()[1] for l in Path('/proc/self/status').read_text()"
        ".splitlines() if l.startswith('VmHWM')))*1024\n"
        "d = Path(sys.argv[1]); pair = (d/'base.safetensors', d/'tuned.safetensors')\n"
        "from dora_dynamics.checkpoints.plan import make_plan, Options\n"
        "import resource; before = (peak(), read())\n"
        "c(*pair, ['layers.3.self_attn.q_proj'])\n"
        "print(peak() - before[0], read() - before[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                          text=True, check=True, cwd=ROOT)  # fmt: skip
    mapped, read = map(int, done.stdout.split())
    assert mapped < 2.0 * 2 * 67_108_864  # both sides of one weight, and the code that measures
    assert read < 30_000_000  # code and headers; the weights are mapped, not read
