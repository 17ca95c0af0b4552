"""`dora-dynamics runs`: what run directories hold."""

from __future__ import annotations

from dataclasses import asdict

import click


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
def runs(paths: tuple[str, ...], as_json: bool) -> None:
    """Say what each RUN directory holds: method, axis, sites, steps, baseline."""
    from dora_dynamics.commands.printing import print_json, say
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
        return

    for run in described:
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
