"""Run directories made of random paths, as a recorder would have left them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dora_dynamics.decomposition import UnitChange
from dora_dynamics.report.recorded import Recorded, Run
from dora_dynamics.runs.directory import RunInfo, append_rows, create_run, write_info
from dora_dynamics.runs.snapshots import save_units
from dora_dynamics.sites import Site
from dora_dynamics.statistics import select_checkpoints
from dora_dynamics.trajectory import COLUMNS, validate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def make_run(
    path: Path,
    method: str = "FT",
    *,
    run: str | None = None,
    layers: int = 6,
    roles: Sequence[str] = ("query", "value"),
    steps: Sequence[int] = (0, 10, 20, 30, 40),
    heads: int = 0,
    site: str = "encoder.{layer}.{role}",
    seed: int = 0,
    keep_units: int = 0,
    total_decay: float = 0.0,
    axis: str = "output",
    baseline: str = "the model's own weights when the recorder was made",
    change: Mapping[str, object] | None = None,
) -> Path:
    """Write one run; `change` overrides columns of its last row."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    sites = [(layer, role) for layer in range(layers) for role in roles]
    for step in steps:
        for layer, role in sites:
            for head in range(heads) if heads else [None]:
                row: dict[str, object] = dict.fromkeys(
                    (c.name for c in COLUMNS if c.kind == "number"), 0.0
                )
                turned = (1 + rng.random()) * step * 1e-6 * (1 + layer)
                signed = rng.normal() * step * 1e-4
                row |= {
                    "run": run or path.name,
                    "method": method,
                    "step": step,
                    "site": site.format(layer=layer, role=role),
                    "layer": layer,
                    "stack": "",
                    "role": role,
                    "head": head,
                    "units": 8,
                    "delta_magnitude": abs(signed),
                    "delta_direction": turned,
                    "signed_delta_magnitude": signed,
                    "relative_delta_magnitude": abs(signed) / 2,
                    "magnitude_before": 2.0,
                    "unit_coupling": float(rng.uniform(-1, 1)),
                    "unit_slope": float(rng.normal()),
                    "total_decay": total_decay * step / max(*steps, 1),
                    "zero_units": 0,
                    "non_finite": 0,
                }
                rows.append(row)
    rows[-1] |= change or {}
    create_run(path)
    append_rows(path, rows)
    write_info(
        path,
        RunInfo(
            run=run or path.name,
            method=method,
            axis=axis,  # type: ignore[arg-type]
            targets=list(roles),
            sites=[site.format(layer=layer, role=role) for layer, role in sites],
            baseline=baseline,
            model="Tiny",
            seed=seed,
            keep=["units"] if keep_units else [],
        ),
    )
    if keep_units:
        units = {}
        for layer, role in sites:
            name = site.format(layer=layer, role=role)
            difference = rng.uniform(-0.9, 0.9, size=keep_units)
            ones = np.ones(keep_units)
            units[Site(name=name, layer=layer, stack="", role=role)] = UnitChange(
                ones, ones + difference, difference, rng.random(keep_units), ones, difference
            )
        save_units(path, steps[-1], units)
    return path


def many_rows(sites: int, steps: int, methods: Sequence[str] = ("FT",)) -> Recorded:
    """Runs of many rows, noise in every bit of the numbers, as reading them would give."""
    rng = np.random.default_rng(0)
    tables, runs = [], []
    for method in methods:
        rows = sites * steps
        number = np.repeat(np.arange(sites), steps)
        columns: dict[str, object] = {
            column.name: rng.normal(size=rows) if column.kind == "number" else 0
            for column in COLUMNS
        }
        layer, role = number // 2, np.array(["query", "value"])[number % 2]
        columns |= {
            "run": f"{method}-0",
            "method": method,
            "step": np.tile(np.arange(steps) * 10, sites),
            "site": [f"model.layers.{n}.self_attn.{r}" for n, r in zip(layer, role, strict=True)],
            "layer": layer,
            "stack": "",
            "role": role,
            "head": np.nan,
            "delta_magnitude": rng.random(rows),
            "delta_direction": rng.random(rows) * 1e-4,
            "total_decay": 0.0,
        }
        tables.append(validate(pd.DataFrame(columns)))
        info = RunInfo(f"{method}-0", method, "output", ["query"], [], "a baseline", "Large")
        runs.append(Run(info.run, Path(info.run), info))
    table = pd.concat(tables, ignore_index=True)
    return Recorded(tuple(runs), (), table, select_checkpoints(table, count=4, kind="late"))
