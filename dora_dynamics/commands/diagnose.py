"""`dora-dynamics diagnose`: where a method stands between LoRA and full fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dora_dynamics.diagnosis import Diagnosis


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN...", type=click.Path())
@click.option(
    "--against",
    multiple=True,
    type=click.Path(),
    metavar="RUN",
    help="Runs of FT and LoRA to compare with; may be given several times, and takes a glob. "
    "Default: the project's own runs, for a first look.",
)
@click.option("--alone", is_flag=True, help="Compare with nothing.")
@click.option("--method", help="The method to diagnose, where the runs hold several.")
@click.option("--lora", default="LoRA", show_default=True, help="Its name among the references.")
@click.option("--ft", default="FT", show_default=True, help="Its name among the references.")
@click.option(
    "--checkpoints", default=4, show_default=True, type=click.IntRange(1), help="Late steps used."
)
@click.option(
    "--error-level",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 0.5, min_open=True, max_open=True),
    help="Share of diagnoses with a false statement.",
)
@click.option("--table", "with_table", is_flag=True, help="Print the table of evidence as well.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
def diagnose(
    paths: tuple[str, ...],
    against: tuple[str, ...],
    alone: bool,
    method: str | None,
    lora: str,
    ft: str,
    checkpoints: int,
    error_level: float,
    with_table: bool,
    as_json: bool,
) -> None:
    """Say whether the method of the RUNs changes weights as LoRA does or as full fine-tuning.

    Exit code 0 whatever the verdict; "not enough data" is one.
    """
    if alone and against:
        raise click.UsageError("--alone compares with nothing: leave out --against, or --alone.")
    from dora_dynamics.commands.printing import print_json, say
    from dora_dynamics.commands.run_paths import named_runs
    from dora_dynamics.diagnosis import diagnose as find

    found = find(
        named_runs(paths),
        named_runs(against) if against else None if alone else "recorded",
        method=method,
        lora=lora,
        ft=ft,
        checkpoints=checkpoints,
        error_level=error_level,
    )
    if as_json:
        print_json(_plain(found))
        return
    say(str(found))
    if with_table and not found.table.empty:
        shown = found.table.drop(columns=["meaning", "scale"])
        say("\n" + shown.to_string(index=False, float_format="{:.3g}".format))


def _plain(found: Diagnosis) -> dict[str, Any]:
    """A diagnosis as JSON values; what is NaN is null."""
    import math
    from dataclasses import asdict

    from dora_dynamics.commands.printing import records

    def value(x: Any) -> Any:
        if isinstance(x, float) and not math.isfinite(x):
            return None
        if isinstance(x, dict):
            return {key: value(v) for key, v in x.items()}
        return [value(v) for v in x] if isinstance(x, (list, tuple)) else x

    plain = {name: getattr(found, name) for name in found.__dataclass_fields__}
    plain["statements"] = [asdict(statement) for statement in found.statements]
    plain["placement"] = None if found.placement is None else asdict(found.placement)
    plain["table"] = records(found.table)
    result: dict[str, Any] = value(plain)
    return result
