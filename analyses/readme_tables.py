"""Run: `python -m analyses.readme_tables` (seconds).

Writes the tables of README.md from the result files below analyses/results/, between the lines
`<!-- begin: NAME -->` and `<!-- end: NAME -->`; no number there is typed by hand.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pandas as pd

from analyses import _stored as stored
from analyses import answers, architecture_table, speed_tables, support_table, walkthrough
from analyses.reproduce import verdict_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

README: Final = Path(__file__).parent.parent / "README.md"
STARTS: Final = {"minilm": "MiniLM", "bart": "our BART"}
"""The starting points of the study, as their results are named, and in words."""


def finding() -> str:
    """Coupling with the paper's total decay and with none, beside the paper's points."""
    lines = [
        "| | | | paper's points, pooled | pooled | across layers | across units "
        "| across layers, no decay | across units, no decay |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    certain = []
    for name, words in STARTS.items():
        with_decay, without = (
            stored.table(f"reproduction_{name}{ending}") for ending in ("", "_no_decay")
        )
        for role in ("query", "value"):
            for method in ("FT", "LoRA", "DoRA"):
                paper = _row(with_decay, role, method, "pooled")["paper"]
                cells = [
                    _estimate(table, role, method, level)
                    for table, level in (
                        (with_decay, "pooled"),
                        (with_decay, "within_step"),
                        (with_decay, "units"),
                        (without, "within_step"),
                        (without, "units"),
                    )
                ]
                lines.append(
                    f"| {words} | {role} | {method} | {paper:+.2f} | {' | '.join(cells)} |"
                )
        holds = {
            level: int((verdict_table(with_decay, level)["verdict"] == "holds").sum())
            for level in ("pooled", "within_step", "units")
        }
        layers = _row(with_decay, "query", "FT", "within_step")["layers"]
        certain.append(
            f"on {words} ({layers:.0f} layers) {holds['pooled']} pooled, {holds['within_step']} "
            f"across layers and {holds['units']} across units"
        )
    about = stored.about("reproduction_minilm")
    seeds = len({job["seed"] for job in about["jobs"]})
    steps, batch = (about["recipes"][0][name] for name in ("steps", "batch_size"))
    made = [
        stored.about(f"reproduction_{name}{ending}")
        for name in STARTS
        for ending in ("", "_no_decay")
    ]
    machines = dict.fromkeys(f"{run['machine']}, torch {run['versions']['torch']}" for run in made)
    return "\n".join(
        [
            *lines,
            "",
            "Pearson r of (ΔD, ΔM) with 95% intervals over layers and seeds: "
            f"{seeds} seeds, {steps} steps of batch {batch}, four late checkpoints; "
            f"{'; '.join(machines)}.",
            "",
            "Of the paper's six signs are certain (the whole 95% interval has the sign): "
            f"{'; '.join(certain)}.",
        ]
    )


def scores() -> str:
    """Held-out score before and after, mean over seeds, with the total decay of each method."""
    about = stored.about("reproduction_minilm")
    none = stored.about("reproduction_minilm_no_decay")
    decay = {recipe["method"]: recipe["total_decay"] for recipe in about["recipes"]}
    lines = [
        "| | total decay Λ | name → docstring | package | name → docstring, no decay "
        "| package, no decay |",
        "|---|---|---|---|---|---|",
    ]
    for method in ("before", "FT", "LoRA", "DoRA"):
        cells = []
        for result in (about, none):
            jobs = pd.DataFrame([*result["jobs"], {"method": "before"} | result["before"]])
            means = jobs[jobs["method"] == method][["retrieval", "label"]].mean()
            cells += [f"{means['retrieval']:.3f}", f"{means['label']:.3f}"]
        total = f"{decay[method]:.3f}" if method in decay else ""
        lines.append(f"| {method} | {total} | {' | '.join(cells)} |")
    return "\n".join(lines)


def why() -> str:
    """What the study found of weight decay and of LoRA's line."""
    return "\n\n".join(
        f"**{entry.title}** ([figure](figures/{entry.name}.png)). {_first(entry.answer())}"
        for entry in answers.ENTRIES
        if entry.name in ("weight_decay", "update_geometry")
    )


def _first(text: str) -> str:
    return text.split("\n\n")[0]


def paper() -> str:
    """The paper's text against its own points."""
    table = stored.table("paper_figures")
    lines = [
        "| | | r of the plotted points | 95%, layers as printed | 95%, layers by the points' order "
        "| slope | n | r in the text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        printed, reordered = (
            f"[{row[f'pearson_low{ending}']:+.2f}, {row[f'pearson_high{ending}']:+.2f}]"
            for ending in ("", "_reordered")
        )
        text = "" if pd.isna(row["text"]) else f"{row['text']:+.2f}"
        lines.append(
            f"| Figure {row['figure']}, {row['role']} | {row['method']} | {row['pearson']:+.2f} | "
            f"{printed} | {reordered} | {row['slope']:+.2f} | {row['n']} | {text} |"
        )
    return "\n".join(lines)


def checkpoints() -> str:
    """Time of a comparison beside `cat`, and its memory."""
    table = stored.table("checkpoint_performance")
    size = table["mb"].iloc[0] / 1000
    lines = [
        f"| {size:.0f} GB of bf16 in the page cache | times `cat` of the same files "
        "| memory added |",
        "|---|---|---|",
    ]
    names = {"core": "core install", "fast": "with the extra `fast`"}
    for path, name in names.items():
        row = table[(table["weights"] == "all") & (table["path"] == path)].iloc[0]
        lines.append(f"| {name} | {row['ratio']:.1f} | {row['anonymous_mb']:.0f} MB |")
    return "\n".join([*lines, "", f"{table['machine'].iloc[0]}; medians of rounds in turns."])


def _row(table: pd.DataFrame, role: str, method: str, level: str) -> pd.Series[float]:
    chosen = table[
        (table["role"] == role)
        & (table["method"] == method)
        & (table["level"] == level)
        & ~table["signed"]
    ]
    return chosen.iloc[0]


def _estimate(table: pd.DataFrame, role: str, method: str, level: str) -> str:
    row = _row(table, role, method, level)
    return f"{row['pearson']:+.2f} [{row['pearson_low']:+.2f}, {row['pearson_high']:+.2f}]"


BLOCKS: Final[dict[str, Callable[[], str]]] = {
    "finding": finding,
    "scores": scores,
    "why": why,
    "paper": paper,
    "architectures": architecture_table.table,
    "checkpoints": checkpoints,
    "peft": support_table.table,
    "speed": speed_tables.block,
    "walkthrough": walkthrough.block,
}


def filled(text: str) -> str:
    """The text of the README with every block written anew.

    Raises:
        ValueError: a block's lines are missing.
    """
    for name, write in BLOCKS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"README.md lacks the lines {begin} and {end}.")
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        body = f"{begin}\n\n{write()}\n\n{end}"
        text = pattern.sub(lambda _, body=body: body, text)  # type: ignore[misc]
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the tables into README.md, or says with --check whether they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m analyses.readme_tables")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    if options.check:
        if filled(text) != text:
            raise SystemExit("README.md is out of date: python -m analyses.readme_tables")
    else:
        README.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
