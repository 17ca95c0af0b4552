"""`dora-dynamics runs`: what run directories hold."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
def runs(paths: tuple[str, ...], as_json: bool) -> None:
    """Say what each RUN directory holds: method, axis, sites, steps, baseline.

    One run is described in full; several are a table, and below it what they have in common and
    in what they differ.
    """
    from dora_dynamics.commands.printing import print_json
    from dora_dynamics.commands.run_paths import named_runs
    from dora_dynamics.runs.directory import read_info, read_run

    described = []
    for path in named_runs(paths):
        info, table = read_info(path), read_run(path)
        steps = sorted(int(step) for step in table["step"].unique())
        non_finite = int((table["non_finite"] > 0).sum())
        described.append(
            asdict(info)
            | {"path": path, "steps": steps, "rows": len(table), "non_finite_rows": non_finite}
        )
    if as_json:
        print_json(described)
    elif len(described) == 1:
        _tell_one(described[0])
    else:
        _tell_many(described)


def _tell_one(run: dict[str, Any]) -> None:
    from dora_dynamics.commands.printing import say

    steps = run["steps"]
    span = f"{len(steps)} from {steps[0]} to {steps[-1]}" if steps else "none yet"
    say(f"{run['path']}  {run['run']}  ({run['method']})")
    say(f"  model     {run['model']}")
    say(f"  baseline  {run['baseline']}")
    say(f"  weights   {len(run['sites'])} sites, targets {', '.join(run['targets'])}")
    for site, others in run["also_known_as"].items():
        say(f"  one       {site} is also {', '.join(others)}")
    say(f"  units     axis {run['axis']}")
    say(f"  steps     {span}, {run['rows']} rows")
    say(f"  recorded  {run['created']}, {run['machine']}")
    if run["non_finite_rows"]:
        say(f"  warning   {run['non_finite_rows']} rows with NaN or Inf in the weights")


_COLUMNS = (
    *("run", "name", "method", "seed", "sites", "steps", "last step", "rows", "rows with NaN"),
    "recorded (UTC)",
)
_MOST_NAMED = 3
"""Runs that are named where a fact is theirs alone."""
_MOST_TOLD = 5
"""What is told of each fact, where runs differ in it."""


def _tell_many(described: Sequence[dict[str, Any]]) -> None:
    from dora_dynamics.commands.printing import print_table, say

    print_table([_line(run) for run in described], _COLUMNS)
    click.echo()
    for fact in ("model", "baseline", "targets", "axis", "machine"):
        groups: dict[str, list[str]] = defaultdict(list)
        for run in described:
            value = run[fact]
            groups[value if isinstance(value, str) else ", ".join(value)].append(run["path"])
        title = fact
        for value, paths in list(groups.items())[:_MOST_TOLD]:
            whose = f"  ({_whose(paths)})" if len(groups) > 1 else ""
            say(f"{title:<8}  {value}{whose}")
            title = ""
        if len(groups) > _MOST_TOLD:
            say(f"{title:<8}  and {len(groups) - _MOST_TOLD} others: see --json")


def _line(run: dict[str, Any]) -> dict[str, Any]:
    """A run as a line of the table."""
    return {
        "run": run["path"],
        "name": run["run"] if run["run"] != Path(run["path"]).resolve().name else None,
        "method": run["method"],
        "seed": run["seed"],
        "sites": len(run["sites"]),
        "steps": len(run["steps"]),
        "last step": run["steps"][-1] if run["steps"] else None,
        "rows": run["rows"],
        "rows with NaN": run["non_finite_rows"] or None,
        "recorded (UTC)": run["created"][:16].replace("T", " "),
    }


def _whose(paths: Sequence[str]) -> str:
    if len(paths) > _MOST_NAMED:
        return f"{len(paths)} runs, one of them {paths[0]}"
    return ", ".join(paths)
