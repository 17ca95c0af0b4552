"""Many fine-tuning runs from one starting point, spread over processes and GPUs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pandas as pd
import torch
from tqdm import tqdm

import dora_dynamics as dd
from analyses import _results
from analyses.finetuning import models, pairs, starting_point
from analyses.finetuning.recipe import Recipe
from analyses.finetuning.task import PairModel, Task
from analyses.finetuning.training import adapt, fine_tune
from dora_dynamics import provenance
from dora_dynamics.runs.directory import RUN_FILE, TRAJECTORY_FILE, read_info, read_run

if TYPE_CHECKING:
    import argparse

Adapt: TypeAlias = Callable[[PairModel, Recipe], None]

WORKERS_PER_GPU: Final = 6
PAUSE: Final = 10.0
"""Minutes without a new run after which a sweep was interrupted, not at work."""
_OUTCOME: Final = "outcome.json"
_START: Final = "start.json"


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: of its run directory; unlike all others of the sweep.
        recipe: how it is trained.
        seed: of the adapters' start and of the order of the examples.
        tags: what tells its condition; columns of the tables that `Sweep` reads.
        follow: what to record where that is not the recipe's roles.
        recording: further arguments of the `Recorder`.
        adapt: prepares the model for the recipe's method; a function of a module.
        capture: take W_0 before the method may rewrite it.
        graph: replay a captured graph on a GPU.
        may_fail: note an error as the job's outcome, and go on with the others.
    """

    name: str
    recipe: Recipe
    seed: int
    tags: dict[str, Any] = field(default_factory=dict)
    follow: tuple[str, ...] | None = None
    recording: dict[str, Any] = field(default_factory=dict)
    adapt: Adapt = adapt
    capture: bool = False
    graph: bool = True
    may_fail: bool = False


@dataclass(frozen=True)
class Sweep:
    """What came out of the jobs of a sweep.

    Attributes:
        about: data, model, versions, machine, and the score of every job: what is written beside
            the results as JSON.
        folder: holds the run directories.
    """

    about: dict[str, Any]
    folder: Path

    @property
    def scores(self) -> pd.DataFrame:
        """A row a job: its name, its tags, its held-out score, its seconds; or its error."""
        return pd.DataFrame(self.about["jobs"])

    @property
    def finished(self) -> list[dict[str, Any]]:
        """The jobs that came to their end."""
        return [job for job in self.about["jobs"] if not job.get("error")]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The jobs that ended in an error that they were allowed."""
        return [job for job in self.about["jobs"] if job.get("error")]

    def trajectory(self, count: int | None = 4) -> pd.DataFrame:
        """All rows of all runs, or those of `count` late checkpoints, with the tags as columns."""
        tables = []
        for job in self.finished:
            table = dd.load_runs(self.folder / job["job"])
            table = table if count is None else dd.select_checkpoints(table, count, "late")
            own = {name: job[name] for name in job if name not in _SCORES | set(table.columns)}
            tables.append(table.assign(**own))
        return pd.concat(tables, ignore_index=True)


_SCORES: Final = frozenset({"retrieval", "label", "loss", "seconds", "error", "trained_parameters"})


def add_options(
    parser: argparse.ArgumentParser, name: str, *, steps: int, batch_size: int, seeds: int
) -> None:
    """The options that every recipe of the study has."""
    starting_point.add_options(parser, examples=300)
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds, from 0 on")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--held-out", type=int, default=300, help="pairs kept for the score")
    parser.add_argument("--workers", type=int, help="processes; default: some a GPU, one on a CPU")
    parser.add_argument("--name", default=name, help="name of the files written")
    parser.add_argument("--redraw", action="store_true", help="use the results of the last time")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on after an interruption; runs of these settings that have a score are kept",
    )


def results(options: argparse.Namespace, ending: str = ".json") -> Path:
    """The file of results of a recipe."""
    return _results.file(options.out, f"{options.name}{ending}")


def run_or_read(options: argparse.Namespace, jobs: Sequence[Job]) -> Sweep:
    """Run the jobs, or with `--redraw` read what the last run of them left.

    Where that was interrupted, its finished runs are read, and what is missing is named in the
    JSON file under `unfinished`.
    """
    file = results(options)
    folder = Path(options.out) / "runs" / options.name
    if options.redraw and file.exists():
        return Sweep(json.loads(file.read_text(encoding="utf-8")), folder)
    if options.redraw:
        return _interrupted(options, jobs, folder)
    sweep = run(options, jobs, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(sweep.about, indent=1) + "\n", encoding="utf-8")
    return sweep


def _interrupted(options: argparse.Namespace, jobs: Sequence[Job], folder: Path) -> Sweep:
    """What an interrupted sweep finished; written beside the results, as a whole one would be."""
    done = [outcome for job in jobs if (outcome := _finished(job, folder))]
    if not done:
        raise SystemExit(
            f"{folder} holds no finished run of these settings to draw: run without --redraw."
        )
    names = {outcome["job"] for outcome in done}
    about = {
        "model": Path(options.model).name if options.model else models.MINILM,
        "data": options.data and Path(options.data).name,
        "jobs": done,
        "unfinished": [job.name for job in jobs if job.name not in names],
        "recipes": _recipes([job for job in jobs if job.name in names]),
        **_made_on(done, folder),
    }
    file = results(options)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return Sweep(about, folder)


def _finished(job: Job, folder: Path) -> dict[str, Any] | None:
    """The outcome of a job whose run is complete; its score is missing where that was cut off."""
    scored, rows = _scored(job, folder), folder / job.name / TRAJECTORY_FILE
    if scored is not None:
        return scored
    if not rows.exists() or not _is_of(job, folder):
        return None
    if job.recipe.steps not in set(read_run(folder / job.name)["step"]):
        return None
    return _tagged(job) | dict.fromkeys(("retrieval", "label", "loss"), None)


def _scored(job: Job, folder: Path) -> dict[str, Any] | None:
    """The outcome of a job that ran to its end."""
    outcome = folder / job.name / _OUTCOME
    if not outcome.exists() or not _is_of(job, folder):
        return None
    found: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
    return found


def _is_of(job: Job, folder: Path) -> bool:
    """Whether the run of a job's name was trained as the job asks.

    Names do not tell everything: a sweep of more steps has jobs of the same names.
    """
    if not (folder / job.name / RUN_FILE).exists():
        return False
    info = read_info(folder / job.name)
    trained = dict(info.hyperparameters.get("recipe", {}))
    trained["roles"] = tuple(trained.get("roles", ()))
    return info.seed == job.seed and asdict(job.recipe) == asdict(Recipe("")) | trained


def _check_start(folder: Path, start: dict[str, Any], *, resume: bool) -> None:
    """Note from what the runs of a folder start, which those that are added to them must share."""
    file = folder / _START
    if resume and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name in start if start[name] != before.get(name)]
        if other:
            raise SystemExit(
                f"the runs in {folder} started from another {', '.join(other)}: give what they "
                "started from, or run without --resume to replace them."
            )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(start) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, jobs: Sequence[Job], folder: Path) -> Sweep:
    """Run all jobs from the model and the data that the options name."""
    started = starting_point.load(options, options.held_out)
    task, base, device = started.task, started.base, torch.device(options.device)
    base.fit_head(task.train.to(device))
    before = base.score(task.held_out.to(device))
    start = {
        "model": models.digest(base.backbone),
        "states": base.states,
        "data": pairs.digest(started.pairs),
        "held_out": options.held_out,
    }
    _check_start(folder, start, resume=options.resume)
    done: list[dict[str, Any]] = []
    if options.resume:
        done = [outcome for job in jobs if (outcome := _scored(job, folder))]
    else:  # so that, if this is interrupted, no run of before is taken for one of now
        for job in jobs:
            (folder / job.name / _OUTCOME).unlink(missing_ok=True)
    names = {outcome["job"] for outcome in done}
    left = [job for job in jobs if job.name not in names]
    workers = options.workers or (WORKERS_PER_GPU * _gpus() if device.type == "cuda" else 1)
    workers = min(workers, max(1, len(left)))
    with tqdm(
        total=len(left), desc=options.name, unit="run", disable=True if workers == 1 else None
    ) as bar:
        for outcome in _outcomes(base, task, left, folder, device, workers):
            done.append(outcome)
            bar.update()
            bar.set_postfix(last=outcome["job"], refresh=False)
    order = {job.name: place for place, job in enumerate(jobs)}
    about = {
        "model": Path(options.model).name if options.model else models.MINILM,
        "states": base.states,
        "data": options.data and Path(options.data).name,
        "pairs": len(started.pairs),
        "data_digest": pairs.digest(started.pairs),
        "held_out": options.held_out,
        "before": asdict(before),
        "jobs": sorted(done, key=lambda outcome: order[outcome["job"]]),
        "recipes": _recipes(jobs),
        **_made_on(done, folder),
    }
    return Sweep(about, folder)


def _made_on(done: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Versions and machine of most runs; where some ran elsewhere, how many ran where.

    And in how many minutes they were begun, long pauses aside: what a sweep took whose runs have no
    times.
    """
    places: Counter[tuple[str, str]] = Counter()
    begun = []
    for outcome in done:
        file = folder / outcome["job"] / RUN_FILE
        if file.exists():
            made = json.loads(file.read_text(encoding="utf-8"))
            places[json.dumps(made["versions"]), made["machine"]] += 1
            begun.append(datetime.fromisoformat(made["created"]))
    if not places:
        return {"versions": provenance.versions(), "machine": provenance.machine()}
    versions, machine = places.most_common(1)[0][0]
    gaps = [(b - a).total_seconds() / 60 for a, b in pairwise(sorted(begun))]
    minutes = round(sum(gap for gap in gaps if gap < PAUSE), 1)
    found = {"versions": json.loads(versions), "machine": machine, "begun_in_minutes": minutes}
    if len(places) > 1:
        found["runs_by_machine"] = [
            {"runs": count, "machine": machine, "torch": json.loads(versions)["torch"]}
            for (versions, machine), count in places.items()
        ]
    return found


def _recipes(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The distinct recipes of the jobs, in their order."""
    return [asdict(recipe) for recipe in dict.fromkeys(job.recipe for job in jobs)]


def _gpus() -> int:
    return torch.cuda.device_count()


def _outcomes(
    base: PairModel,
    task: Task,
    jobs: Sequence[Job],
    folder: Path,
    device: torch.device,
    workers: int,
) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        there = task.to(device)
        for job in jobs:
            yield _outcome(base, there, job, folder)
        return
    context = torch.multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    given = (base.to("cpu"), task, folder, device.type, counter)
    with context.Pool(workers, _start, given) as pool:
        yield from pool.imap_unordered(_outcome_of, jobs)


_worker: dict[str, Any] = {}


def _start(base: PairModel, task: Task, folder: Path, device_type: str, counter: Any) -> None:
    """Prepare a worker process: its GPU in turn, and the model and the data on it."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    torch.set_num_threads(1)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", number % _gpus())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    _worker.update(base=base.to(device), task=task.to(device), folder=folder)


def _outcome_of(job: Job) -> dict[str, Any]:
    return _outcome(_worker["base"], _worker["task"], job, _worker["folder"])


def _outcome(base: PairModel, task: Task, job: Job, folder: Path) -> dict[str, Any]:
    """Run one job; its name, its tags, its score, and how long it took."""
    about = _tagged(job)
    (folder / job.name / _OUTCOME).unlink(missing_ok=True)  # of a run that this one replaces
    start = perf_counter()
    try:
        tuned = fine_tune(
            base,
            task,
            job.recipe,
            job.seed,
            folder / job.name,
            adapt=job.adapt,
            follow=job.follow,
            capture=job.capture,
            graph=job.graph,
            **job.recording,
        )
    except Exception as error:
        if not job.may_fail:
            raise
        return about | {"error": f"{type(error).__name__}: {error}"[:300]}
    found = asdict(tuned.score) | {"trained_parameters": tuned.trained_parameters}
    about |= found | {"seconds": round(perf_counter() - start, 1)}
    unfinished = folder / job.name / f"{_OUTCOME}.unfinished"
    unfinished.write_text(json.dumps(about) + "\n", encoding="utf-8")
    unfinished.replace(folder / job.name / _OUTCOME)
    return about


def _tagged(job: Job) -> dict[str, Any]:
    return {"job": job.name, "method": job.recipe.method, "seed": job.seed} | job.tags
