"""Run: `python -m analyses.answers` (seconds).

Writes analyses/README.md, one paragraph a recipe of the study (question, answer with numbers,
figure, command, cost), and the section of the study in figures/README.md, both from the result
files below analyses/results/. No number in them is typed by hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from analyses import _findings as findings
from analyses import _findings_of_methods as of_methods
from analyses import _recipes
from analyses import _stored as stored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT: Final = Path(__file__).parent.parent
BEGIN: Final = "<!-- begin: study -->"
END: Final = "<!-- end: study -->"


@dataclass(frozen=True)
class Entry:
    """One recipe of the study as it is told.

    Attributes:
        name: of its module, and of its figure unless `figure` names another.
        title: a few words.
        question: what it asks.
        answer: writes what came out, from the results.
        alt: of the figure.
        command: of its full setting.
        files: result files with a sweep's jobs, for the cost.
        figure: name of the figure.
        more: further figures: name, what it is, what it shows, command.
    """

    name: str
    title: str
    question: str
    answer: Callable[[], str]
    alt: str
    command: str
    files: tuple[str, ...] = ()
    figure: str = ""
    more: tuple[tuple[str, str, str, str], ...] = ()


RANK: Final = (
    "python -m analyses.rank --seeds 5 --steps 400 --batch-size 128 --held-out 1000 "
    "--data pairs.jsonl"
)


def _reproduce(name: str) -> str:
    """The command that wrote the results of that name."""
    model = " --model models/bart --states decoder" if "bart" in name else ""
    decay = " --weight-decay 0" if name.endswith("no_decay") else ""
    return (
        "python -m analyses.reproduce --seeds 5 --steps 1500 --batch-size 128 --held-out 1000 "
        f"--data pairs.jsonl{model}{decay} --name {name}"
    )


MORE: Final = {
    "reproduction_bart": "LoRA's points rise; FT's and DoRA's fall, with two clouds in FT's query. A "
    "colour is a layer of the encoder and that of its number in the decoder.",
    "reproduction_minilm_no_decay": "all six lines rise; only LoRA's points keep to theirs.",
    "reproduction_bart_no_decay": "all six lines rise; FT's value and DoRA's query points scatter "
    "most.",
    "rank_no_decay": "LoRA and DoRA score alike at every rank; DoRA's coupling goes up with rank, "
    "inside wide intervals, and the effective rank of its ΔW down to rank 32, then up.",
}
"""What the further figures show."""

ENTRIES: Final = (
    Entry(
        "reproduce", "Does the finding hold?",
        "Fine-tuned three ways from two starting points, five seeds each, 1,500 steps of batch 128: "
        "does ΔM fall with ΔD under FT and DoRA, and rise under LoRA?",
        findings.reproduced,
        "ΔM against ΔD of MiniLM's query and value matrices, three panels each: LoRA's points rise "
        "on a line; FT's and DoRA's fall for value, and scatter for query.",
        _reproduce("reproduction_minilm"),
        stored.there(
            "reproduction_minilm", "reproduction_minilm_no_decay", "reproduction_bart",
            "reproduction_bart_no_decay",
        ),
        "reproduction_minilm",
        tuple(
            (name, stored.RUNS[name], MORE[name], _reproduce(name))
            for name in stored.there(
                "reproduction_bart", "reproduction_minilm_no_decay", "reproduction_bart_no_decay"
            )
        ),
    ),
    Entry(
        "weight_decay", "Why: weight decay",
        "An intervention: the same fine-tuning with total decay Λ from 0 to 10%. Is it decay that "
        "sets the sign, and is the contrast of LoRA and DoRA left without it?",
        findings.decay,
        "r against total decay for query and value: LoRA stays near +0.7 to +1, FT and DoRA go "
        "down as decay grows, but for DoRA across the layers of query; the change of magnitude "
        "against total decay lies on the prediction for FT and LoRA, below it for DoRA.",
        "python -m analyses.weight_decay --seeds 5 --steps 500 --batch-size 128 --held-out 1000 "
        "--data pairs.jsonl",
        ("weight_decay",),
    ),
    Entry(
        "decay_placement", "Which parameter has to decay",
        "DoRA again, with the decay on all of m, A and B, on m alone, or on A and B alone: which of "
        "them makes the sign?",
        findings.placement,
        "r against total decay for query and value, and the mean change of magnitude: the lines of "
        "decay on all and on m alone lie on each other; decay on A and B alone changes nothing.",
        "python -m analyses.decay_placement --seeds 5 --steps 500 --batch-size 128 --held-out 1000 "
        "--data pairs.jsonl",
        ("decay_placement",),
    ),
    Entry(
        "update_geometry", "LoRA's line is geometry",
        "Is LoRA's line what any update orthogonal to the weights gives?",
        findings.geometry,
        "ΔM/m against ΔD of MiniLM's runs with decay, on logarithmic axes: LoRA on the orthogonal "
        "curve, FT and DoRA above it; the paper's LoRA points about the same curve, on linear axes; the radial share over "
        "training (dotted: that of a random direction).",
        "python -m analyses.update_geometry --runs "
        + " ".join(stored.about("update_geometry")["runs"]),
    ),
    Entry(
        "gradient_geometry", "DoRA's gradients",
        "Do Eq. 6, 7 and 11 hold, what does the projection do to the gradient's conditioning, and "
        "do scenarios S1 and S2 of Sec. 4.2 happen?",
        findings.gradients,
        "Four panels: errors of the equations near machine precision; share of the gradient along "
        "the weight; gain in participation ratio, below 0.5% either way; r of the magnitude's gradient with ΔD, near "
        "−1 for steps of one length and above 0 for steps as they are.",
        "python -m analyses.gradient_geometry --batches 64",
    ),
    Entry(
        "sign_map", "When to expect which sign",
        "How do learning rate, rank, batch size, optimizer and the choice of checkpoints change the "
        "coupling, with the paper's decay and without?",
        findings.when,
        "A map of r: LoRA's columns are red throughout; FT's and DoRA's are blue with decay, but "
        "DoRA's under SGD, and of both signs without, few of them sure; all are red in the last row, "
        "where the whole run is pooled.",
        "python -m analyses.sign_map --seeds 3 --steps 300 --batch-size 128 --held-out 1000 "
        "--data pairs.jsonl",
        ("sign_map",),
    ),
    Entry(
        "adapter_zoo", "The adapter zoo",
        "Every PEFT method on the same task: is one that moves more like full fine-tuning also "
        "better at the task?",
        of_methods.zoo,
        "Left, a map of full fine-tuning and the methods of PEFT by r across units and radial share, coloured by score; right, "
        "score against distance from full fine-tuning, without a trend.",
        "python -m analyses.adapter_zoo --seeds 3 --steps 200 --batch-size 64 --held-out 1000 "
        "--data pairs.jsonl",
        ("adapter_zoo",),
    ),
    Entry(
        "heads_and_norms", "Below and beyond matrices",
        "Can attention heads and layer norms be decomposed too, and do they show the finding?",
        of_methods.below,
        "ΔM/m against ΔD of heads and norms: FT's and DoRA's heads on level lines set by decay, "
        "LoRA's rising; norms scattered.",
        "python -m analyses.heads_and_norms --seeds 3 --steps 400 --batch-size 128 --held-out 1000 "
        "--data pairs.jsonl",
        ("heads_and_norms",),
    ),
    Entry(
        "rank", "Rank and capacity",
        "Score, coupling and the directions that are really used, against rank.",
        of_methods.ranks,
        "Score against rank: LoRA's lies above DoRA's, up to rank 64, where in the paper's Table 15 "
        "beside it DoRA's does. r against rank, level, of wide intervals; effective rank against rank: "
        "DoRA's level at FT's, LoRA's rising below its rank.",
        RANK,
        stored.there("rank", "rank_no_decay"),
        more=tuple(
            (name, "no decay", MORE[name], f"{RANK} --no-decay --name {name}")
            for name in stored.there("rank_no_decay")
        ),
    ),
    Entry(
        "merge", "Merging",
        "Does a merged adapter compute what the adapted model computes, and what does it cost?",
        of_methods.merged,
        "Left, largest differences between merged and adapted outputs by dtype: none for ours, at "
        "the dtype's precision for PEFT's; right, latency over the original model's.",
        "python -m analyses.merge",
    ),
)  # fmt: skip


def cost(entry: Entry) -> str:
    """Runs, minutes they took together, and where."""
    if not entry.files:
        made = stored.about(entry.name)
        return f"on {made['machine']}, torch {made['versions']['torch']}"
    sweeps = [stored.about(name) for name in entry.files]
    jobs = [job for made in sweeps for job in made["jobs"]]
    minutes = np.nansum([job.get("seconds") or np.nan for job in jobs]) / 60
    timed = sum(1 for job in jobs if job.get("seconds"))
    if timed == len(jobs):
        took = f", {minutes:.0f} minutes of work, many at a time"
    elif "begun_in_minutes" in sweeps[0]:
        took = f", begun within {sweeps[0]['begun_in_minutes']:.0f} minutes, many at a time"
    else:
        took = f", {timed} of them timed: {minutes:.0f} minutes of work, many at a time"
    return f"{len(jobs)} runs{took}; {_where(sweeps)}"


def _where(sweeps: Sequence[dict[str, Any]]) -> str:
    """The machines of all runs of some sweeps; how many ran on each, where there are several."""
    runs: dict[str, int] = {}
    for made in sweeps:
        alone = {
            "runs": len(made["jobs"]),
            "machine": made["machine"],
            "torch": made["versions"]["torch"],
        }
        for place in made.get("runs_by_machine", [alone]):
            words = f"{place['machine']}, torch {place['torch']}"
            runs[words] = runs.get(words, 0) + place["runs"]
    if len(runs) == 1:
        return next(iter(runs))
    return "; ".join(f"{count} on {words}" for words, count in runs.items())


def paragraph(entry: Entry) -> str:
    """One recipe in analyses/README.md."""
    figure = f"{entry.figure or entry.name}.png"
    more = "".join(f", [{words}](../figures/{name}.png)" for name, words, *_ in entry.more)
    return "\n".join(
        [
            f"## {entry.title} (`analyses.{entry.name}`)",
            "",
            f"*{entry.question}*",
            "",
            entry.answer(),
            "",
            f"[Figure](../figures/{figure}){more} · `{entry.command}` · {cost(entry)}.",
        ]
    )


def readme() -> str:
    """analyses/README.md."""
    opening = """# The study

Does the DoRA paper's finding hold, when, and why. Each recipe reads on one screen and runs on two
cores in a small setting (its defaults); the full settings, with which the results here were made,
are in `analyses.full_study`. Results with seeds, versions and hyperparameters are in
[`results/`](results). This page is written from them by `python -m analyses.answers`.

Other recipes: `paper_figures` (the paper's own points), `interval_coverage` (how often intervals
hold the truth), `diagnosis_simulation` (error rates of `dd.diagnose`), `performance`,
`observer_cost`, `adapter_cost`, `growth`, `checkpoint_performance`, `scale` (speed and memory),
`from_checkpoints`, `teaching`, `lesson.ipynb`."""
    return "\n\n".join([opening, *map(paragraph, ENTRIES)]) + "\n"


def gallery(text: str) -> str:
    """figures/README.md with the study, and the recipes without a picture, written anew."""
    lines = ["| picture | what it shows | command |", "|---|---|---|"]
    for entry in ENTRIES:
        figure = f"{entry.figure or entry.name}.png"
        lines.append(
            f"| ![{entry.alt}]({figure}) | **{entry.title}** {entry.question} {entry.alt} "
            f"| `{entry.command}` |"
        )
        lines += [
            f"| ![The same figure, {words}: {shown}]({name}.png) | **{entry.title}** The same, "
            f"{words}: {shown} | `{command}` |"
            for name, words, shown, command in entry.more
        ]
    body = "\n".join([BEGIN, "", "## The study", "", *lines, "", END])
    text = _with_section(text, BEGIN, END, body)
    rest = _with_section(text, _recipes.BEGIN, _recipes.END, "")
    return _with_section(text, _recipes.BEGIN, _recipes.END, _recipes.section(rest))


def _with_section(text: str, begin: str, end: str, body: str) -> str:
    if begin not in text:
        raise ValueError(f"figures/README.md lacks the lines {begin} and {end}.")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: body, text)


def main() -> None:
    """Writes both files."""
    (ROOT / "analyses" / "README.md").write_text(readme(), encoding="utf-8")
    file = ROOT / "figures" / "README.md"
    file.write_text(gallery(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
