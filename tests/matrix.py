"""The tests under the oldest and the newest versions that install here: `python -m tests.matrix`.

Each environment is made anew with pip, runs `TESTS`, and has its row in the table of
CONTRIBUTING.md. What does not install is a row, too. Run it before a release, on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Final

from dora_dynamics.provenance import machine, now

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = ("torch", "numpy", "pandas", "scipy", "transformers", "peft")
OLDEST: Final = (
    "numpy==2.0.*",
    "pandas==2.2.*",
    "matplotlib==3.9.*",
    "scipy==1.13.*",
    "safetensors==0.5.*",
    "transformers==4.50.*",
    "peft==0.15.*",
    "accelerate==1.0.*",
)
ENVIRONMENTS: Final[dict[str, tuple[str, ...]]] = {
    "oldest": ("torch==2.6.*", *OLDEST),
    "oldest, newest torch": OLDEST,
    "newest": PACKAGES,
}
TESTS: Final = (
    "tests/robustness",
    "tests/effective",
    "tests/recording",
    "tests/integrations/test_transformers.py",
    "tests/test_decomposition.py",
    "tests/test_intervals.py",
    "tests/test_low_rank_change.py",
    "tests/test_recorder.py",
    "tests/test_run_directory.py",
    "tests/test_snapshots.py",
    "tests/test_statistics.py",
    "tests/test_trajectory.py",
    "tests/checkpoints",
)
BEGIN, END = "<!-- begin: matrix -->", "<!-- end: matrix -->"


def main() -> None:
    """Run the environments that are named, all by default, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *ENVIRONMENTS])
    names = parser.parse_args().names or list(ENVIRONMENTS)
    file = ROOT / "CONTRIBUTING.md"
    text = file.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    old, _, tail = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("|")}
    rows = {name: line for name, line in rows.items() if name in ENVIRONMENTS}
    for name in names:
        rows[name] = row_of(name, ENVIRONMENTS[name])
        print(rows[name], flush=True)
    title = f"| environment | Python | {' | '.join(PACKAGES)} | tests | on |"
    lines = [title, "|" + "---|" * (len(PACKAGES) + 4)]
    lines += [rows[name] for name in ENVIRONMENTS if name in rows]
    table = "\n".join(["", "", *lines, "", ""])
    file.write_text(f"{head}{BEGIN}{table}{END}{tail}", encoding="utf-8")


def row_of(name: str, pins: tuple[str, ...]) -> str:
    """Make the environment, run the tests in it, and say how that went."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        command = [python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[hf]"]
        install = [*command, *pins, "pytest>=8.3", "pytest-xdist", "hypothesis>=6.100"]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            result, versions = "does not install here", ["–"] * (len(PACKAGES) + 1)
            print(done.stderr[-2000:], file=sys.stderr)
        else:
            versions = versions_in(python)
            result = tested(python)
    on = f"{now()[:10]}, {machine()}"
    return f"| {name} | {' | '.join(versions)} | {result} | {on} |"


def versions_in(python: str) -> list[str]:
    """Versions of Python and `PACKAGES` in an environment."""
    program = (
        "import platform, importlib.metadata as m\n"
        f"print(platform.python_version(), *map(m.version, {PACKAGES!r}))"
    )
    return subprocess.check_output([python, "-c", program], text=True).split()


def tested(python: str) -> str:
    """The last line of the tests' report, in words; warnings of old versions are no failure."""
    command = [python, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-W", "default"]
    done = subprocess.run(
        [*command, "-o", "filterwarnings=", *TESTS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-6000:], file=sys.stderr)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
    return ", ".join(counts) or "no report"


if __name__ == "__main__":
    main()
