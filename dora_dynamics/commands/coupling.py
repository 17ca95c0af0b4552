"""`dora-dynamics coupling`: how ΔM goes with ΔD in recorded runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

    from dora_dynamics.statistics import CheckpointKind, Level

_LEVELS: dict[Level, str] = {
    "pooled": "all points, as in the paper",
    "within_step": "across layers at each checkpoint, averaged",
    "within_layer": "along each weight's own path, averaged",
    "units": "inside each weight, across its units, averaged",
}
"""What r is taken over at each level."""


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option(
    "--level", "levels", multiple=True, type=click.Choice(list(_LEVELS)), help="Default: all."
)
@click.option("--by", default="method,role", show_default=True, help="Comma-separated columns.")
@click.option("--signed", is_flag=True, help="Use signed ΔM: negative where units shrink.")
@click.option(
    "--checkpoints",
    type=click.Choice(["late", "even", "early", "all"]),
    default="late",
    show_default=True,
    help="Four steps of each run, late ones as in the paper, or all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
def coupling(
    paths: tuple[str, ...],
    levels: tuple[Level, ...],
    by: str,
    signed: bool,
    checkpoints: CheckpointKind | str,
    as_json: bool,
) -> None:
    """Correlation and slope of ΔM on ΔD over the rows of each RUN, with 95% intervals."""
    import pandas as pd

    from dora_dynamics.commands.printing import print_json, records, say
    from dora_dynamics.commands.run_paths import named_runs, refuse_many_groups
    from dora_dynamics.runs.directory import load_runs
    from dora_dynamics.statistics import coupling as couple
    from dora_dynamics.statistics import select_checkpoints

    table = load_runs(named_runs(paths))
    columns = [name.strip() for name in by.split(",") if name.strip()]
    unknown = [name for name in columns if name not in table.columns]
    if unknown or not columns:
        raise click.UsageError(
            f"--by names columns of the table ({', '.join(table.columns[:8])}), not {by!r}."
        )
    if not (table["step"] > 0).any():
        raise InputError("the runs hold no row beyond step 0, so there is nothing to correlate.")
    if checkpoints != "all":
        table = select_checkpoints(table, count=4, kind=checkpoints)  # type: ignore[arg-type]
    refuse_many_groups(table, columns)
    chosen: tuple[Level, ...] = levels or tuple(_LEVELS)
    tables = [couple(table, by=columns, level=level, signed=signed) for level in chosen]
    found = pd.concat(tables, ignore_index=True)
    if as_json:
        print_json(records(found))
    else:
        say(_readable(found, columns))


def _readable(found: pd.DataFrame, by: list[str]) -> str:
    from dora_dynamics.commands.printing import interval, number

    shown: pd.DataFrame = found[[*by, "level"]].copy()
    for name, title in (("pearson", "r"), ("spearman", "ρ")):
        bounds = zip(found[name], found[f"{name}_low"], found[f"{name}_high"], strict=True)
        shown[title] = [interval(*values) for values in bounds]
    shown["slope"] = [number(value, "+.3g") for value in found["slope"]]
    shown["n"], shown["p"] = found["n"], [number(value, ".3g") for value in found["p_value"]]
    reasons = [reason for reason in dict.fromkeys(found["reason"]) if reason]
    notes = "".join(f"\nnote: {reason}" for reason in reasons)
    told = f"{legend(found['level'])}\np: that of r, by permutation."
    return f"{shown.to_string(index=False)}\n{told}{notes}"


def legend(levels: Iterable[Level]) -> str:
    """What r, n and these levels are in a printed table of couplings."""
    told = ["r: Pearson's, ρ: Spearman's, both with 95% intervals over layers and runs; n: points."]
    told += [f"{level}: {_LEVELS[level]}." for level in dict.fromkeys(levels)]
    return "\n".join(told)
