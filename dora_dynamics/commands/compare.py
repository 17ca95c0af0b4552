"""`dora-dynamics compare`: the table from checkpoints on disk."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from dora_dynamics.commands.printing import print_json, records, say
from dora_dynamics.commands.targets import parse_targets
from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd

    from dora_dynamics.checkpoints.plan import Plan
    from dora_dynamics.checkpoints.spreading import Processes

_EXAMPLES = """\b
Examples:
  dora-dynamics compare bert-base my-run/ --targets query,value --out runs/mine
  dora-dynamics compare base.safetensors 'ckpt/step-*.pt' --out runs/ft
  dora-dynamics compare --base llama-8b my-dora-adapter --dry-run
  dora-dynamics compare my-dora-adapter     (the base is the one the adapter names)
"""


@click.command(epilog=_EXAMPLES)
@click.argument("paths", nargs=-1, metavar="BASE CKPT [CKPT ...]")
@click.option("--base", help="The base; then every argument is a checkpoint.")
@click.option(
    "--targets",
    help="Comma-separated roles (query), ends of module paths (q_proj), globs or /regex/. "
    "Default: what an adapter adapts; every linear layer of full weights.",
)
@click.option("--out", type=click.Path(), help="Run directory to write.")
@click.option("--axis", type=click.Choice(["output", "input"]), default="output", show_default=True)
@click.option("--method", help="Name of the method.  [default: as the files tell]")
@click.option("--run", "run_name", help="Name of the run.  [default: name of --out]")
@click.option("--steps", help="Comma-separated steps of the checkpoints, where they tell none.")
@click.option(
    "--granularity",
    type=click.Choice(["module", "matrix", "head"]),
    default="matrix",
    show_default=True,
    help="Fused weights whole, in their parts, or by attention head.",
)
@click.option(
    "--transposed",
    multiple=True,
    metavar="PATTERN",
    help="Modules that store (in, out), where no config.json tells; can be repeated.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Threads that measure.  [default: one for each core, at most 16]",
)
@click.option("--resume", is_flag=True, help="Go on with the interrupted comparison in --out.")
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
@click.option("--keep-non-finite", is_flag=True, help="Rows of NaN for weights with NaN or Inf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
@click.option("--dry-run", is_flag=True, help="Say what would be compared, and stop.")
def compare(paths: tuple[str, ...], **options: Any) -> None:
    """Measure how checkpoints differ from their base, in magnitude and direction.

    BASE and CKPT are transformers folders, .safetensors, .bin, .pt, .pth or Lightning .ckpt
    files, torch distributed checkpoints, PEFT adapters, Kohya, diffusers or LyCORIS LoRA files,
    folders of checkpoints, globs, or names on the Hugging Face hub. No model is built, and only
    the chosen weights are read. torchrun -m dora_dynamics compare … spreads the weights over
    processes and machines that share the files.
    """
    from dora_dynamics.checkpoints.spreading import LostProcessError, started_processes

    if not paths:
        raise click.UsageError("give a base and at least one checkpoint.")
    try:
        with started_processes() as processes:
            try:
                _compare(paths, processes, **options)
            except InputError as error:
                if processes.is_first or isinstance(error, LostProcessError):
                    raise
                sys.exit(2)  # the first process says it
    except KeyboardInterrupt:
        hint = " The same command with --resume goes on." if options["out"] else ""
        click.echo(f"Interrupted.{hint}", err=True)
        sys.exit(1)


def _compare(
    paths: tuple[str, ...],
    processes: Processes,
    *,
    base: str | None,
    targets: str | None,
    out: str | None,
    steps: str | None,
    run_name: str | None,
    granularity: Any,
    transposed: tuple[str, ...],
    resume: bool,
    as_json: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    from dora_dynamics.checkpoints.compare import run_plan
    from dora_dynamics.checkpoints.plan import Options, describe, make_plan

    if resume and out is None:
        raise click.UsageError("--resume needs --out, the run directory to go on with.")
    base, checkpoints = _split_base(paths, base)
    chosen = Options(parse_targets(targets), granularity, transposed, _steps(steps))
    plan = processes.each(lambda: make_plan(base, list(checkpoints), chosen))
    if dry_run and processes.is_first:
        print_json({"plan": describe(plan)}) if as_json else _print_plan(plan)
    if dry_run:
        return
    with _progress(plan.nbytes // processes.count, shown=processes.is_first) as progress:
        table = run_plan(
            plan,
            out=out,
            run=run_name,
            resume=resume,
            progress=progress,
            processes=processes,
            **options,
        )
    if not processes.is_first:
        return
    if as_json:
        print_json({**describe(plan), "out": out, "rows": records(table)})
    else:
        _print_plan(plan)
        say(_readable(table))
        if out is not None:
            click.echo(f"Wrote {len(table)} rows to {out}.")


def _split_base(paths: tuple[str, ...], base: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The base and the checkpoints: adapters alone name their own base."""
    from pathlib import Path

    if base is not None:
        return base, paths
    if len(paths) == 1 or (Path(paths[0]) / "adapter_config.json").is_file():
        return None, paths
    return paths[0], paths[1:]


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--steps must be whole numbers: {text!r}.") from error


class _progress:  # noqa: N801  # used as a function is
    """A bar of bytes on a terminal, nothing elsewhere."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total = total
        self._shown = shown

    def __enter__(self) -> Callable[[int, int], None] | None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=self._total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not (self._shown and sys.stderr.isatty()),
            desc="comparing",
        )
        return lambda done, _: _update(self._bar, done)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _update(bar: Any, done: int) -> None:
    bar.update(done)


def _print_plan(plan: Plan) -> None:
    say(f"base  {plan.base.path}  ({len(plan.sites)} weights chosen)")
    for checkpoint in plan.checkpoints:
        say(
            f"step {checkpoint.step:>8}  {checkpoint.method:<8} {len(checkpoint.sites):>4} weights "
            f"{_size(checkpoint.nbytes):>9}  {checkpoint.path}"
        )
    for line in dict.fromkeys(_remarks(plan)):
        say(f"  note: {line}")


def _remarks(plan: Plan) -> Iterator[str]:
    for checkpoint in plan.checkpoints:
        yield from checkpoint.notes
        for names, where in (
            (checkpoint.only_base, "the base"),
            (checkpoint.only_checkpoint, "the checkpoint"),
        ):
            if names:
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                yield f"{len(names)} only in {where}, left out: {shown}"


def _readable(table: pd.DataFrame) -> str:
    """One line for each step and role: means over the weights."""
    means = (
        table.groupby(["step", "role"], sort=False)[
            ["delta_magnitude", "delta_direction", "signed_delta_magnitude"]
        ]
        .mean()
        .reset_index()
    )
    means.insert(2, "weights", table.groupby(["step", "role"], sort=False).size().to_numpy())
    means.columns = ["step", "role", "weights", "ΔM", "ΔD", "signed ΔM"]
    return means.to_string(index=False, float_format=lambda value: f"{value:.6g}")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
