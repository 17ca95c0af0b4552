"""The page as a reader meets it, in a headless Chromium."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dora_dynamics as dd
from analyses._browser import chromium
from tests.report.browser import need_browser
from tests.report.report_runs import make_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pandas as pd
    from playwright.sync_api import Browser, Page

LAYERS = 4
HOSTILE = "<script>alert(1)</script>"
MORE_HOSTILE = "</script><img src=x onerror=alert(2)>$$x$$"


@dataclass
class Opened:
    """A page that is open, what it said, and the table it shows."""

    page: Page
    table: pd.DataFrame
    heard: list[str] = field(default_factory=list)

    def points(self, panel: str) -> dict[str, Any]:
        """The data of the points of a panel as the browser has it."""
        found: dict[str, Any] = self.page.evaluate(
            """(panel) => {
              const source = doraReport.doc.get_model_by_name(`${panel}:points`);
              const names = ["x", "y", "site", "step"];
              return Object.fromEntries(names.map((name) => [name, [...source.data[name]]]));
            }""",
            panel,
        )
        return found

    def place(self, panel: str, number: int) -> tuple[float, float]:
        """Where on the screen a point of a panel is."""
        self.page.locator(f"#{panel}").scroll_into_view_if_needed()
        x, y = self.page.evaluate(
            """([panel, number]) => {
              const plot = doraReport.doc.get_model_by_name(panel);
              const view = Bokeh.index.get(plot);
              const { data } = doraReport.doc.get_model_by_name(`${panel}:points`);
              const box = document.getElementById(panel).getBoundingClientRect();
              return [box.x + view.frame.x_scale.compute(data.x[number]),
                      box.y + view.frame.y_scale.compute(data.y[number])];
            }""",
            [panel, number],
        )
        return x, y


def number(text: str) -> float:
    return float(text.replace("−", "-"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    need_browser()
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def opened(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    folder = tmp_path_factory.mktemp("report")
    runs = [
        make_run(folder / "ft", layers=LAYERS, keep_units=6),
        make_run(folder / "dora", "DoRA", layers=LAYERS, heads=2, seed=1),
        make_run(
            folder / "hostile",
            MORE_HOSTILE,
            run=HOSTILE,
            layers=LAYERS,
            seed=2,
            site="{layer}." + HOSTILE + ".{role}",
        ),
    ]
    path = dd.write_report(runs, folder / "report.html", title=HOSTILE)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    shown = Opened(page, dd.load_runs(runs))
    page.on("console", lambda said: shown.heard.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda error: shown.heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: shown.heard.append(f"error: dialog {dialog.message}"))
    page.on("request", lambda asked: shown.heard.append(f"asked: {asked.url}"))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
    yield shown
    page.close()


def test_it_loads_without_an_error_or_a_request(opened: Opened) -> None:
    opened.page.mouse.wheel(0, 20_000)
    opened.page.wait_for_timeout(100)
    bad = [line for line in opened.heard if not line.startswith(("log:", "info:", "asked: "))]
    assert bad == []
    asked = [line for line in opened.heard if line.startswith("asked: ")]
    assert [line.partition(":")[2].strip()[:5] for line in asked[:1]] == ["file:"]
    assert [
        line for line in asked[1:] if not line.startswith(("asked: data:", "asked: blob:"))
    ] == []
    assert opened.page.locator("#failed").is_hidden()
    drawn = opened.page.evaluate("doraReport.doc.roots().every((p) => Bokeh.index.get(p) !== null)")
    assert drawn


def test_the_slider_moves_the_points(opened: Opened) -> None:
    page = opened.page
    page.locator("#steps-0-0").scroll_into_view_if_needed()
    slider = page.get_by_role("slider", name="Step")
    places = []
    for key, step in (("End", 40), ("Home", 0), ("ArrowRight", 10), ("ArrowRight", 20)):
        slider.press(key)
        page.wait_for_function("(step) => doraReport.state.step === step", arg=step)
        page.wait_for_timeout(60)
        rows = opened.table[
            (opened.table["run"] == "ft")
            & (opened.table["role"] == "query")
            & (opened.table["step"] == step)
        ].set_index("site")
        points = opened.points("steps-0-0")
        assert points["step"] == [step] * LAYERS
        own = rows.loc[points["site"]]
        np.testing.assert_allclose(points["x"], own["delta_direction"], rtol=1e-6)
        np.testing.assert_allclose(points["y"], own["delta_magnitude"], rtol=1e-6)
        places.append(opened.place("steps-0-0", 0))
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
    assert len(set(places)) == 4
    slider.press("End")


def test_hover_shows_the_site(opened: Opened) -> None:
    page = opened.page
    for panel, site in (("paper-0-0", "encoder.0.query"), ("paper-0-2", f"0.{HOSTILE}.query")):
        points = opened.points(panel)
        assert points["site"][3] == site
        page.mouse.move(*opened.place(panel, 3))
        tip = page.locator(".bk-tooltip-content").filter(has_text=site)
        tip.first.wait_for(state="visible", timeout=5000)
        told = dict(row.split(":\t") for row in tip.first.inner_text().splitlines())
        assert told["weight"] == site
        assert page.locator(".bk-tooltip-row-label", has_text="weight").count() <= 2
        assert float(told["ΔD"]) == pytest.approx(points["x"][3], rel=1e-3)
        assert float(told["ΔM"]) == pytest.approx(points["y"][3], rel=1e-3)
    assert page.locator("main script, main img").count() == 0
    page.mouse.move(0, 0)


def test_legend_site_and_arrow_keys_reach_every_chart(opened: Opened) -> None:
    page = opened.page
    layer = page.locator("input[name=layer]").first
    layer.press("Space")
    assert not any(".0." in site for site in opened.points("paper-0-0")["site"])
    layer.press("Space")
    method = page.get_by_role("checkbox", name="FT", exact=True)
    method.press("Space")
    assert page.locator("#paper-0-0").is_hidden()
    assert page.locator("#paper-0-1").is_visible()
    method.press("Space")

    field = page.get_by_label("Weight", exact=True).first
    field.fill("encoder.2.value")
    field.press("Enter")
    told = page.locator("#site-told")
    told.filter(has_text="encoder.2.value at step 40").wait_for()
    assert told.inner_text().count("ΔD") == 3  # FT, and two heads of DoRA
    chart = page.locator("#paper-0-0")
    chart.press("ArrowRight")
    readout = page.locator("#paper-0-0 + .readout")
    assert "encoder.0.query, step" in readout.inner_text()
    chart.press("Tab")
    assert page.evaluate("document.activeElement.id") == "paper-0-1"  # one stop a chart
    page.locator("#heat-delta_magnitude-0-0").press("ArrowRight")
    page.locator("#heat-delta_magnitude-0-0").press("ArrowDown")
    assert "layer" in page.locator("#heat-delta_magnitude-0-0 + .readout").inner_text()


def test_every_table_holds_what_its_chart_shows(opened: Opened) -> None:
    page = opened.page
    for kind in ("paper", "steps", "trajectories", "heat", "by_layer", "heads", "cloud"):
        details = page.locator(f"details[data-table={kind}]")
        details.locator("summary").press("Enter")
        details.locator("tbody tr").first.wait_for()
    rows = page.locator("details[data-table=steps] tbody tr")
    assert rows.count() == 2 * LAYERS * (1 + 2 + 1)
    cells = rows.first.locator("td").all_inner_texts()
    last = opened.table[(opened.table["run"] == "ft") & (opened.table["step"] == 40)].iloc[0]
    assert cells[:6] == ["FT", "ft", last["site"], "query", "0", "40"]
    assert number(cells[6]) == pytest.approx(last["delta_direction"], rel=5e-3)
    assert number(cells[7]) == pytest.approx(last["delta_magnitude"], rel=5e-3)
    heat = page.locator("details[data-table=heat] tbody tr").first.locator("td").all_inner_texts()
    assert number(heat[-1]) == pytest.approx(last["delta_magnitude"], rel=5e-3)
    assert page.locator("main script, main img").count() == 0


def test_dark_narrow_and_on_paper(opened: Opened) -> None:
    page = opened.page
    swatch = page.locator(".swatch").first
    light = swatch.evaluate("(s) => s.style.backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert swatch.evaluate("(s) => s.style.backgroundColor") != light
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in dark[4:-1].split(",")) < 60
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    pictures = page.locator("svg.for-print")
    assert pictures.count() == page.evaluate("doraReport.doc.roots().length")
    assert pictures.first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert swatch.evaluate("(s) => s.style.backgroundColor") == light
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen", color_scheme="light")
    assert pictures.count() == 0
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert [line for line in opened.heard if line.startswith(("error", "warning"))] == []


def test_a_method_that_lacks_a_role_has_words_for_axes(browser: Browser, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    runs = [
        make_run(tmp_path / "ft", layers=2, roles=["query", "value", "key", "up"]),
        make_run(tmp_path / "lora", "LoRA", layers=2, roles=["value"], seed=1),
    ]
    page = browser.new_page(viewport={"width": 1200, "height": 3000})
    page.goto(dd.write_report(runs, tmp_path / "report.html").as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
    for role in ("value", "query"):
        page.get_by_role("combobox", name="Role").select_option(label=role)
        for kind in ("steps", "trajectories", "heat", "by_layer", "paper"):
            panels = page.evaluate(
                """(kind) => doraReport.page.panels
                  .filter((panel) => panel.kind === kind)
                  .map((panel) => [panel.method, panel.id])""",
                kind,
            )
            assert {method for method, _ in panels} == {0, 1}
            for method, panel in panels:
                place = page.locator(f"#{panel}")
                place.locator("xpath=..").scroll_into_view_if_needed()
                expect(place).to_be_visible(visible=(method, role) != (1, "query"))
    expect(page.locator("figure[data-method='1'] .stat")).to_have_text("not recorded")
    page.close()
