"""`dora-dynamics plot`: figures from recorded runs."""

from __future__ import annotations

from pathlib import Path

import click

from dora_dynamics.errors import InputError

_KINDS = {
    "magnitude_direction": "ΔM against ΔD, the paper's Figure 2",
    "delta_magnitude": "ΔM over training",
    "delta_direction": "ΔD over training",
    "coupling": "r with its interval, at each level",
}


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option(
    "--kind",
    type=click.Choice(list(_KINDS)),
    default="magnitude_direction",
    show_default=True,
    help="; ".join(f"{name}: {meaning}" for name, meaning in _KINDS.items()) + ".",
)
@click.option("--signed", is_flag=True, help="Use signed ΔM: negative where units shrink.")
@click.option(
    "--style", type=click.Choice(["paper", "column", "slide"]), default="paper", show_default=True
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("magnitude_direction.svg"),
    show_default=True,
    help="File to write: .png, .svg or .pdf.",
)
def plot(paths: tuple[str, ...], kind: str, signed: bool, style: str, out: Path) -> None:
    """Draw the rows of each RUN: by default ΔM against ΔD at four late checkpoints."""
    import pandas as pd

    from dora_dynamics import plotting
    from dora_dynamics.commands.run_paths import named_runs, refuse_many_groups
    from dora_dynamics.runs.directory import load_runs
    from dora_dynamics.statistics import coupling, select_checkpoints

    if out.suffix not in (".png", ".svg", ".pdf"):
        raise click.UsageError(f"--out must end in .png, .svg or .pdf, not {out.name!r}.")
    table = load_runs(named_runs(paths))
    late = select_checkpoints(table, count=4, kind="late")
    if late.empty:
        raise InputError("the runs hold no row beyond step 0, so there is nothing to draw.")
    options = {"style": style}
    if kind == "magnitude_direction":
        figure = plotting.magnitude_direction(late, signed=signed, **options)  # type: ignore[arg-type]
    elif kind == "coupling":
        refuse_many_groups(late, ["method", "role"])
        levels = ("pooled", "within_step", "within_layer", "units")
        found = [coupling(late, level=level, signed=signed, permutations=0) for level in levels]  # type: ignore[arg-type]
        figure = plotting.coupling_forest(pd.concat(found, ignore_index=True), **options)  # type: ignore[arg-type]
    else:
        measure = f"signed_{kind}" if signed and kind == "delta_magnitude" else kind
        figure = plotting.trajectories(table, measure, **options)  # type: ignore[arg-type]
    plotting.save(figure, [out])
    click.echo(f"Wrote {out}.")
