"""The table of magnitude and direction changes, from checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from dora_dynamics._kernels import threads
from dora_dynamics.checkpoints.catalogue import tensor_name
from dora_dynamics.checkpoints.discover import hub_name
from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.checkpoints.plan import (
    Options,
    Plan,
    Planned,
    StrPath,
    describe,
    make_plan,
    read_updates,
    site_bytes,
)
from dora_dynamics.checkpoints.running import Output, Row
from dora_dynamics.checkpoints.spreading import Processes
from dora_dynamics.checkpoints.updates import change_of, is_built
from dora_dynamics.decomposition import AXES, Axis
from dora_dynamics.errors import InputError
from dora_dynamics.runs.directory import RUN_FILE, RunInfo
from dora_dynamics.sites import other_names
from dora_dynamics.trajectory import to_table, trajectory_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from dora_dynamics.sites import Granularity, Site
    from dora_dynamics.sites.select import Target

Progress = Callable[[int, int], None]
"""Called with the bytes that were just read and the bytes there are to read."""

_MOST_THREADS: Final = 16
"""Threads by default, at most: enough for any memory's bandwidth; each holds a few MiB."""
_SITES_AT_ONCE: Final = 4
"""More sites are not measured at once, so that memory stays bounded; of weights that are built as
a whole, one."""


def compare_checkpoints(
    base: StrPath | None,
    checkpoints: StrPath | Sequence[StrPath],
    targets: Sequence[Target] | None = None,
    *,
    out: StrPath | None = None,
    axis: Axis = "output",
    method: str | None = None,
    run: str | None = None,
    steps: Sequence[int] | None = None,
    granularity: Granularity = "matrix",
    transposed: Sequence[str] = (),
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_non_finite: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The trajectory of checkpoints against their base, with no model built.

    One weight is in work at a time, memory-mapped from its file. Names match by name; what only
    one side has is left out and listed in `table.attrs["summary"]`.

    Args:
        base: the pre-trained checkpoint: a folder, a file or a hub name; None to take the base
            that the adapters name.
        checkpoints: folders, files, globs, folders of checkpoints or hub names: full weights,
            PEFT adapters, LoRA files, Lightning's or torch's distributed checkpoints.
        targets: roles, ends of module paths, globs or patterns, as in `Recorder`; by default
            every layer that an adapter adapts, and every linear layer of full weights.
        out: a run directory to write, the same that a recorder writes; None to write none.
        axis: "output" for one unit per output feature (the paper's choice), or "input".
        method: name of the method; by default "FT", "LoRA", "DoRA" or the tuner's name.
        run: name of the run; by default that of `out` or of the method.
        steps: the step of each checkpoint, where neither its name nor its files tell.
        granularity: "module", "matrix" (fused weights in their parts) or "head".
        transposed: globs over module paths of weights stored (in, out), where the base has no
            config.json that tells.
        jobs: threads that measure; by default as many as torch is set to use, at most 16. The
            numbers do not depend on it.
        resume: go on with the interrupted comparison in `out`.
        overwrite: replace the run that `out` holds.
        keep_non_finite: give weights that hold NaN or Inf a row of NaN, rather than refuse them.
        progress: called after each site.

    Raises:
        CheckpointError: a checkpoint is missing, damaged, unsafe or does not fit the base.
        RunDirectoryError: `out` cannot be written or already holds a run.
        ValueError: an argument is out of its range.
    """
    if axis not in AXES:
        raise InputError(f"axis must be 'output' or 'input', not {axis!r}.")
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs must be at least 1, not {jobs}.")
    plan = make_plan(base, checkpoints, Options(targets, granularity, transposed, steps))
    return run_plan(
        plan,
        out=out,
        axis=axis,
        method=method,
        run=run,
        jobs=jobs,
        resume=resume,
        overwrite=overwrite,
        keep_non_finite=keep_non_finite,
        progress=progress,
    )


def run_plan(
    plan: Plan,
    *,
    out: StrPath | None = None,
    axis: Axis = "output",
    method: str | None = None,
    run: str | None = None,
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keep_non_finite: bool = False,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> pd.DataFrame:
    """Measure what a plan lists; arguments and errors as in `compare_checkpoints`.

    Where `processes` share the work, each of them calls this with the same plan; the first writes.
    """
    processes = processes or Processes()
    method = method or _method(plan)
    run = run or (Path(out).name if out is not None else method)
    info = _info(plan, run, method, axis)
    output: Output | None = None

    def open_output() -> list[list[Row]]:
        nonlocal output
        if out is None:
            return []
        if resume and Path(out).exists():
            output, complete = Output.resume(Path(out), info, plan)
            return complete
        if not (overwrite and (Path(out) / RUN_FILE).exists()):
            output = Output.begin(Path(out), info, overwrite=overwrite)
        return []

    def write(rows: Sequence[Row]) -> None:
        nonlocal output
        if out is None:
            return
        if output is None:  # the run that is there stays until there are rows to replace it
            output = Output.begin(Path(out), info, overwrite=overwrite)
        output.append(rows)

    groups = processes.first(open_output)
    if progress is not None:
        for checkpoint in plan.checkpoints[: len(groups)]:
            progress(checkpoint.nbytes, plan.nbytes)
    try:
        for checkpoint in plan.checkpoints[len(groups) :]:
            to_row = partial(trajectory_row, run=run, method=method, step=checkpoint.step)
            measure = partial(_measure, plan, checkpoint, to_row, axis, jobs, progress, processes)
            found = [pair for some in processes.all_results(measure) for pair in some.items()]
            rows = [row for _, row in sorted(found, key=lambda pair: pair[0])]
            if not keep_non_finite:
                _refuse_non_finite(checkpoint, rows)
            if out is not None:
                processes.first(partial(write, rows))
            groups.append(rows)
    except BaseException:
        if output is not None:
            output.discard_if_empty()
        raise
    table = to_table(row for group in groups for row in group)
    table.attrs["summary"] = describe(plan)
    return table


def _measure(
    plan: Plan,
    checkpoint: Planned,
    to_row: Callable[..., Row],
    axis: Axis,
    jobs: int | None,
    progress: Progress | None,
    processes: Processes,
) -> dict[int, Row]:
    """This process's rows of one checkpoint, by their place; `to_row` makes one of a change."""
    updates, _ = read_updates(plan.base, plan.sites, checkpoint.path)
    sites = list(updates)
    mine = processes.share([site_bytes(plan.base, site, updates[site]) for site in sites])

    def row(site: Site) -> Row:
        stored = plan.base.tensors[tensor_name(site)]
        try:
            change = change_of(site, stored, updates[site], axis)
        except CheckpointError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path}: {site.name}: {error}") from error
        return to_row(site, change, head=site.head)

    rows = []
    built = any(map(is_built, updates.values()))
    chosen = [sites[place] for place in mine]
    with _in_threads(row, chosen, jobs, 1 if built else _SITES_AT_ONCE) as measured:
        for site, future in measured.items():
            rows.append(future.result())
            if progress is not None:
                progress(site_bytes(plan.base, site, updates[site]), plan.nbytes)
    return dict(zip(mine, rows, strict=True))


@contextmanager
def _in_threads(
    function: Callable[[Site], Row], sites: Sequence[Site], jobs: int | None, most: int
) -> Iterator[dict[Site, Future[Row]]]:
    """`function` of each site over `jobs` threads: at most `most` sites at once, each over more.

    Torch's own threads are put aside: they cost more than they give on blocks of this size.
    """
    before = torch.get_num_threads()
    jobs = jobs or min(before, _MOST_THREADS)
    at_once = max(1, min(jobs, most, len(sites)))
    pool = ThreadPoolExecutor(at_once)
    torch.set_num_threads(1)
    try:
        with threads.at_most(-(-jobs // at_once)):
            yield {site: pool.submit(copy_context().run, function, site) for site in sites}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def _refuse_non_finite(checkpoint: Planned, rows: Sequence[Row]) -> None:
    bad = [row for row in rows if row["non_finite"]]
    if bad:
        raise CheckpointError(
            f"{checkpoint.path} or its base holds NaN or Inf in {bad[0]['non_finite']} of "
            f"{bad[0]['units']} units of {bad[0]['site']} ({len(bad)} such weights): leave it out, "
            "or pass keep_non_finite=True (--keep-non-finite) to have such weights as rows of NaN."
        )


def _method(plan: Plan) -> str:
    methods = list(dict.fromkeys(checkpoint.method for checkpoint in plan.checkpoints))
    if len(methods) > 1:
        raise CheckpointError(
            f"the checkpoints are of different methods ({', '.join(methods)}): compare them one "
            "by one, or pass method= (--method)."
        )
    return methods[0]


def _info(plan: Plan, run: str, method: str, axis: Axis) -> RunInfo:
    config = plan.base.contents.config
    names = config.get("architectures")
    model = names[0] if isinstance(names, list) and names else config.get("model_type", "unknown")
    return RunInfo(
        run=run,
        method=method,
        axis=axis,
        targets=[t if isinstance(t, str) else t.pattern for t in plan.targets],
        sites=[site.key for site in plan.sites],
        also_known_as=other_names(plan.sites),
        baseline=f"the checkpoint {plan.base.path}, as stored",
        model=f"{model} ({hub_name(plan.base.path)})",
        hyperparameters={
            "source": "checkpoints",
            "base": str(plan.base.path.resolve()),
            "checkpoints": [
                {"path": str(c.path.resolve()), "step": c.step, "notes": list(c.notes)}
                for c in plan.checkpoints
            ],
        },
    )
