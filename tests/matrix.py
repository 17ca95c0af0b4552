"""The tests under the oldest and the newest versions that install here: `python -m tests.matrix`.

Each environment is made anew with pip, of the Python that it names (found on the PATH or among
pyenv's), runs `TESTS`, and has its row in the table of CONTRIBUTING.md. What does not install is a
row, too. Run it before a release, on a quiet machine. `--python FILE` takes an environment that is
there already in place of the first that is named.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
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
    "transformers==4.53.*",
    "peft==0.18.*",
    "accelerate==1.10.*",
)
ENVIRONMENTS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "oldest": ("3.11", ("torch==2.6.*", *OLDEST)),
    "newest": ("3.13", PACKAGES),
}
NEEDED: Final = ("attrs", "scikit-learn")
"""What some of PEFT's methods import and PEFT does not ask for."""
TESTS: Final = (
    "tests/robustness",
    "tests/effective",
    "tests/recording",
    "tests/integrations/test_transformers.py",
    "tests/test_decomposition.py",
    "tests/statistics/test_intervals.py",
    "tests/test_low_rank_change.py",
    "tests/test_recorder.py",
    "tests/runs/test_directory.py",
    "tests/runs/test_snapshots.py",
    "tests/statistics/test_coupling_table.py",
    "tests/test_trajectory.py",
    "tests/checkpoints",
)
BEGIN, END = "<!-- begin: matrix -->", "<!-- end: matrix -->"


def main() -> None:
    """Run the environments that are named, all by default, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *ENVIRONMENTS])
    parser.add_argument("--python", type=Path, help="interpreter of an environment that is there")
    arguments = parser.parse_args()
    names = arguments.names or list(ENVIRONMENTS)
    file = ROOT / "CONTRIBUTING.md"
    text = file.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    old, _, tail = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("|")}
    rows = {name: line for name, line in rows.items() if name in ENVIRONMENTS}
    for name in names:
        rows[name] = row_of(name, *ENVIRONMENTS[name], made=arguments.python)
        arguments.python = None
        print(rows[name], flush=True)
    title = f"| environment | Python | {' | '.join(PACKAGES)} | tests | on |"
    lines = [title, "|" + "---|" * (len(PACKAGES) + 4)]
    lines += [rows[name] for name in ENVIRONMENTS if name in rows]
    table = "\n".join(["", "", *lines, "", ""])
    file.write_text(f"{head}{BEGIN}{table}{END}{tail}", encoding="utf-8")


def row_of(name: str, version: str, pins: tuple[str, ...], made: Path | None = None) -> str:
    """Make the environment, run the tests in it, and say how that went."""
    with tempfile.TemporaryDirectory() as folder:
        python = str(made or Path(folder) / "bin" / "python")
        if made is None and not installed(folder, version, pins):
            result, versions = "does not install here", ["–"] * (len(PACKAGES) + 1)
        else:
            versions = versions_in(python)
            result = tested(python)
    on = f"{now()[:10]}, {machine()}"
    return f"| {name} | {' | '.join(versions)} | {result} | {on} |"


def installed(folder: str, version: str, pins: tuple[str, ...]) -> bool:
    """Make an environment in a folder; whether all of it installed."""
    found = shutil.which(f"python{version}")
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if found is None and not pyenv:
        print(f"there is no Python {version} here", file=sys.stderr)
        return False
    subprocess.run([str(pyenv[-1]) if pyenv else str(found), "-m", "venv", folder], check=True)
    python = str(Path(folder) / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[hf,report]"]
    install = [*command, *pins, "pytest>=8.3", "pytest-xdist", "hypothesis>=6.100", *NEEDED]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0


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
