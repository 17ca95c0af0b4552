"""Run: `python -m analyses.report_page` (about 4 minutes on 2 cores; needs a Chromium).

Fine-tunes the model of `analyses.reproduce` three ways for 60 steps with two seeds, keeping the
arrays of every unit, writes the report of these runs to runs/report/report.html, and takes a
picture of it as Chromium shows it, halfway through the training and with a point hovered.

Writes figures/report.png and analyses/results/report.json. `--redraw` uses the runs of the last
time.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

import dora_dynamics as dd
from analyses import reproduce
from analyses._browser import chromium
from analyses.finetuning import sweep
from analyses.finetuning.recipe import METHODS
from analyses.finetuning.sweep import Job

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from playwright.sync_api import Page

_HOVER: Final = """() => {
  const { doc, page } = doraReport;
  const { id } = page.panels.filter((panel) => panel.kind === "paper" && panel.role === 0).at(-1);
  const view = Bokeh.index.get(doc.get_model_by_name(id));
  const { data } = doc.get_model_by_name(`${id}:points`);
  const box = document.getElementById(id).getBoundingClientRect();
  const low = data.y.indexOf(Math.min(...data.y));
  return [box.x + view.frame.x_scale.compute(data.x[low]),
          box.y + view.frame.y_scale.compute(data.y[low])];
}"""
"""Where on the screen the lowest point of the last method's panel is."""


def picture(report: Path, file: Path) -> None:
    """Takes a picture of a report: the controls, the paper's figure, the points of one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1180, "height": 1500}, device_scale_factor=1.25)
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        _halfway(page)
        page.screenshot(path=file)


def _halfway(page: Page) -> None:
    slider = page.get_by_role("slider", name="Step")
    for _ in range(int(slider.get_attribute("max") or 0) // 2):
        slider.press("ArrowLeft")
    slider.blur()
    page.evaluate("scrollTo(0, document.querySelector('.controls').offsetTop)")
    page.mouse.move(*page.evaluate(_HOVER))
    page.locator(".bk-tooltip-content").first.wait_for()
    page.wait_for_timeout(300)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analyses.report_page",
        description="Fine-tune three ways, write the report of the runs, take its picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    sweep.add_options(parser, "report", steps=60, batch_size=32, seeds=2)
    parser.set_defaults(rank=16, roles=("query", "value"), weight_decay=None, total_decay=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes, writes the report, takes its picture."""
    options = parse(argv)
    jobs = [
        Job(f"{recipe.method}-seed{seed}", recipe, seed, recording={"keep": "units"})
        for recipe in reproduce.recipes(options)
        for seed in range(options.seeds)
    ]
    done = sweep.run_or_read(options, jobs)
    runs = [done.folder / job.name for job in jobs]
    report = dd.write_report(runs, done.folder / "report.html")
    drawn = options.out / "figures" / f"{options.name}.png"
    picture(report, drawn)
    print(f"Wrote {report} and {drawn}")


if __name__ == "__main__":
    main()
