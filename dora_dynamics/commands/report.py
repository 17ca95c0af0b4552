"""`dora-dynamics report`: one page of recorded runs, for a browser without a network."""

from __future__ import annotations

from pathlib import Path

import click

_EXAMPLES = """\b
Examples:
  dora-dynamics report runs/* --out report.html
  dora-dynamics report runs/mine --against runs/ft --against runs/lora
"""


@click.command(epilog=_EXAMPLES)
@click.argument("paths", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="File to write: .html.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="RUN",
    type=click.Path(),
    help="Runs the diagnosis compares with; can be repeated.  [default: the project's own]",
)
@click.option("--title", help="Title of the page.")
@click.option("--all-steps", is_flag=True, help="Every recorded step, however large the page.")
def report(
    paths: tuple[str, ...],
    out: Path,
    against: tuple[str, ...],
    title: str | None,
    all_steps: bool,
) -> None:
    """Write one self-contained HTML page of each RUN: figures to explore, couplings, warnings."""
    from dora_dynamics.commands.run_paths import named_runs
    from dora_dynamics.report import write_report

    if out.suffix not in (".html", ".htm"):
        raise click.UsageError(f"--out must end in .html, not {out.name!r}.")
    against_runs = named_runs(against) if against else None
    write_report(named_runs(paths), out, reference=against_runs, title=title, all_steps=all_steps)
    click.echo(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB).")
