"""The result tables of the recipes that measure speed: one CSV for each kind of machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pandas as pd
import torch

from analyses._performance import SEED
from dora_dynamics.provenance import machine, versions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

PLACES: Final = {"device": "on the device", "host": "in host memory", "file": "in the file"}
"""Where W_0 waits, in words."""


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options that these recipes share, `device` filled in."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--redraw", action="store_true", help="draw from the tables there are")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in (default: .)")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def write(name: str, table: pd.DataFrame, options: argparse.Namespace) -> None:
    """Write a table with the kind of machine, the versions and the seed beside every row."""
    found = versions() | {"numba": version("numba"), "triton": version("triton")}
    table = table.assign(
        machine=machine(),
        torch_threads=torch.get_num_threads(),
        seed=SEED,
        versions=json.dumps(found),
    )
    results = options.out / "analyses" / "results"
    results.mkdir(parents=True, exist_ok=True)
    kind = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu-{platform.machine()}"
    file = results / f"{name}_{kind.lower().replace(' ', '-')}.csv"
    table.to_csv(file, index=False, float_format="%.6g")


def stored(name: str, out: Path) -> list[pd.DataFrame]:
    """The tables of that name of all machines, in the order of their files' names.

    Raises:
        SystemExit: there are none.
    """
    files = sorted((out / "analyses" / "results").glob(f"{name}_*.csv"))
    if not files:
        raise SystemExit(f"no table analyses/results/{name}_*.csv: run without --redraw first.")
    return [pd.read_csv(file) for file in files]


def shown(value: object) -> str:
    """A value of a table as it is printed while the recipe runs."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def version(package: str) -> str:
    """The version of an optional package, "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
