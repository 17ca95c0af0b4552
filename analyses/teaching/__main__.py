"""Run: `python -m analyses.teaching` (a minute; `--runs RUN...` takes recorded runs instead).

Draws six figures to teach the decomposition with, each at slide and at column width, into
figures/teaching/, with captions and alternative texts in figures/README.md and
analyses/results/teaching.json. The animation moves through the recorded runs named by `--runs`
(of FT, LoRA and DoRA), or through those of a short training that it records below runs/teaching/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dora_dynamics as dd
from analyses import reproduce
from analyses.finetuning import sweep
from analyses.finetuning.sweep import Job
from analyses.teaching import animation, gallery, gradient, orthogonal_update, simpson, vectors
from analyses.teaching import weight_decay as decay
from analyses.teaching.picture import STYLES
from dora_dynamics import provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from analyses.teaching.picture import Picture

PICTURES: Final[dict[str, Callable[[], Picture]]] = {
    "vectors": vectors.picture,
    "orthogonal_update": orthogonal_update.picture,
    "weight_decay": decay.picture,
    "gradient": gradient.picture,
    "simpson": simpson.picture,
}
NAMES: Final = (*PICTURES, "animation")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analyses.teaching",
        description="Draw the teaching figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES))
    parser.add_argument("--runs", nargs="+", type=Path, help="run directories of FT, LoRA and DoRA")
    parser.add_argument("--role", default="query", help="which weights the animation shows")
    parser.add_argument("--steps", type=int, default=60, help="of the training it records itself")
    parser.add_argument("--batch-size", type=int, default=16, help="of that training")
    parser.add_argument("--examples", type=int, default=150, help="docstrings a package, of that")
    parser.add_argument("--held-out", type=int, default=60, help="docstrings kept, of that")
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write in")
    return parser.parse_args(argv)


def record(options: argparse.Namespace) -> list[Path]:
    """Fine-tunes the base model of `analyses.reproduce` three ways, shortly; the run directories.

    Runs that are there already, from the same settings, are taken as they are.
    """
    arguments = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in _PASSED]
    chosen = reproduce.parse(["--name=teaching", *arguments])
    jobs = [Job(f"{recipe.method}-seed0", recipe, 0) for recipe in reproduce.recipes(chosen)]
    folder = options.out / "runs" / f"teaching-{options.steps}x{options.batch_size}"
    if not all((folder / job.name / "run.json").exists() for job in jobs):
        sweep.run(chosen, jobs, folder)
    return [folder / job.name for job in jobs]


_PASSED: Final = ("steps", "batch-size", "examples", "held-out", "out")


def moving(runs: Sequence[Path], role: str, stem: Path) -> tuple[Picture, list[Path], Any]:
    """The animation of recorded runs: its words, its films, and what the runs are."""
    table: pd.DataFrame = dd.load_runs(runs)
    motion = animation.Motion(table, role)
    rows = motion.rows.groupby("run", sort=False)
    about = [
        {"run": name, "method": part["method"].iloc[0], "steps": int(part["step"].max())}
        for name, part in rows
    ]
    steps = sorted({run["steps"] for run in about})
    source = f"{len(about)} recorded runs of {' to '.join(f'{n:,}' for n in steps)} steps"
    return animation.picture(motion, source), animation.write(motion, stem), about


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the figures, writes the gallery's section, prints what was written."""
    options = parse(argv)
    folder = options.out / "figures" / "teaching"
    about: dict[str, Any] = {
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "seed": 0,
    }
    figures = {}
    for name in options.only:
        films: list[Path] = []
        if name == "animation":
            runs = options.runs or record(options)
            picture, films, about["runs"] = moving(runs, options.role, folder / name)
        else:
            picture = PICTURES[name]()
        files = [*films, *picture.save(folder, options.styles)]
        print(f"{picture.title}: {', '.join(map(str, files))}")
        figures[name] = {
            "title": picture.title,
            "caption": picture.caption,
            "alt": picture.alt,
            "files": [file.name for file in files],
        }
    file = options.out / "analyses" / "results" / "teaching.json"
    gallery.Results(figures, about).write(file)
    page = options.out / "figures" / "README.md"
    before = page.read_text(encoding="utf-8") if page.exists() else "# Gallery\n"
    page.write_text(gallery.filled(before, gallery.Results.read(file)), encoding="utf-8")
    print(f"Wrote {file} and {page}.")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"analyses.teaching: {error}") from None
