from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import dora_dynamics as dd
from dora_dynamics.cli import main
from dora_dynamics.diagnosis import diagnose
from dora_dynamics.errors import InputError

pytest.importorskip("bokeh")
from dora_dynamics.report import packing, panels
from dora_dynamics.report.kept_units import MOST_POINTS, KeptUnits
from dora_dynamics.report.names import names_of
from dora_dynamics.report.page_data import page_data
from dora_dynamics.report.series import MEASURES, MOST_VALUES, lay_out
from dora_dynamics.report.words import three_digits
from dora_dynamics.report.writing import as_script_json, figures_json
from dora_dynamics.runs.directory import RunDirectoryError
from tests.report.report_runs import make_run, many_rows
from tests.report.unpacking import unpack

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = "<script>alert(1)</script>"
MORE_HOSTILE = "</script><img src=x onerror=alert(2)>\"'&\u2028$$x$$"


class Page(HTMLParser):
    """Elements with their attributes and the text they begin with, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.text: list[str] = []
        self._ended = True
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        self._ended = False

    def handle_endtag(self, tag: str) -> None:
        self._ended = True

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if not self._ended:
            self.elements[-1][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, "".join(text)) for name, attrs, text in self.elements if name == tag]

    def data(self, name: str) -> Any:
        return next(json.loads(t) for attrs, t in self.all("script") if attrs.get("id") == name)


def written(path: Path, *runs: Path, **options: Any) -> Page:
    return Page(dd.write_report(runs, path, **options).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page of runs in which every name is an attack."""
    folder = tmp_path_factory.mktemp("hostile")
    run = make_run(
        folder / "run",
        MORE_HOSTILE,
        run=HOSTILE,
        layers=4,
        roles=(HOSTILE, MORE_HOSTILE),
        site="{layer}." + HOSTILE + ".{role}",
        baseline=MORE_HOSTILE,
        keep_units=5,
        change={"non_finite": 2},
    )
    return written(folder / "report.html", run, title=HOSTILE)


def test_names_stay_text_everywhere(hostile: Page) -> None:
    scripts = hostile.all("script")
    assert [attrs.get("id") for attrs, _ in scripts] == [
        "report-data",
        "report-figures",
        None,
        None,
    ]
    assert not hostile.all("img")
    assert not [name for _, attrs, _ in hostile.elements for name in attrs if name.startswith("on")]
    text = "".join(hostile.text)
    assert HOSTILE in text
    assert MORE_HOSTILE in text
    assert hostile.all("h1") == [({}, HOSTILE)]
    data = hostile.data("report-data")
    assert data["methods"] == [MORE_HOSTILE]
    assert data["sites"][0] == f"0.{HOSTILE}.{HOSTILE}"
    assert data["units"]["snapshots"][0]["sites"][0]["site"] == f"0.{HOSTILE}.{HOSTILE}"
    figures = hostile.data("report-figures")
    bokeh = zlib.decompress(base64.b64decode(figures["docs"]["deflated"])).decode()
    assert json.loads(bokeh)["page"]["roots"]
    assert "script>" not in bokeh + json.dumps(figures)


def test_json_in_a_script_element_cannot_end_it() -> None:
    content = {"</script>": ["<!--", "]]>", "&amp;", "\u2028", "\ud800", 'x"y']}
    text = as_script_json(content)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == content
    with pytest.raises(ValueError, match="JSON"):
        as_script_json(float("nan"))


def test_the_page_may_run_its_own_scripts_and_load_nothing(hostile: Page) -> None:
    policy = next(
        str(attrs["content"]) for attrs, _ in hostile.all("meta") if attrs.get("http-equiv")
    )
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    run = [text for attrs, text in hostile.all("script") if "type" not in attrs]
    assert allowed == {
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run
    }
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    for _, attrs, _ in hostile.elements:
        assert not {"src", "srcset", "action", "data"} & attrs.keys()
        assert str(attrs.get("href", "#")).startswith("#")
    style = "".join(text for _, text in hostile.all("style"))
    assert "url(" not in style
    assert "@import" not in style


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Page]:
    """A run that kept its units and one by heads, and the page of them."""
    folder = tmp_path_factory.mktemp("recorded")
    runs = [
        make_run(folder / "dora", "DoRA", layers=4, roles=("query",), heads=2, seed=1),
        make_run(folder / "ft", layers=4, keep_units=4),
    ]
    return runs, written(folder / "report.html", *runs)


def test_every_chart_has_a_name_a_caption_and_a_table(recorded: tuple[list[Path], Page]) -> None:
    page = recorded[1]
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    charts = [attrs for attrs, _ in page.all("div") if attrs.get("class") == "plot"]
    kinds = {str(attrs["id"]).split("-")[0] for attrs in charts}
    assert kinds == {"paper", "steps", "trajectories", "heat", "by_layer", "heads", "cloud"}
    for attrs in charts:
        assert attrs["tabindex"] == "0"
        assert len(str(attrs["aria-label"])) > 20
        assert attrs["aria-describedby"] in ids
    heads = [str(attrs["id"]) for attrs in charts if str(attrs["id"]).startswith("heads")]
    assert heads == ["heads-0-1", "heads-1-1"]  # of DoRA, whose rows are by head, in both roles
    tables = {attrs["data-table"] for attrs, _ in page.all("details") if "data-table" in attrs}
    assert tables == kinds
    labelled = {attrs["for"] for attrs, _ in page.all("label") if "for" in attrs}
    controls = [*page.all("select"), *page.all("input")]
    inside = {"method", "layer"}  # their labels stand around them
    assert {a["id"] for a, _ in controls if a.get("name") not in inside} <= labelled
    for attrs, _ in page.all("section"):
        assert attrs["aria-labelledby"] in ids
    linked = {str(attrs["href"])[1:] for attrs, _ in page.all("a")}
    assert linked <= set(ids)


def test_packed_numbers_are_those_of_the_table(recorded: tuple[list[Path], Page]) -> None:
    runs, page = recorded
    data = page.data("report-data")
    assert data["methods"] == ["FT", "DoRA"]
    table = dd.load_runs(runs)
    lines = {name: unpack(packed) for name, packed in data["lines"].items()}
    values = {name: unpack(measure["values"]) for name, measure in data["measures"].items()}
    seen, offset = 0, 0
    for run in data["runs"]:
        steps = unpack(run["steps"])
        for line in range(run["first"], run["first"] + run["count"]):
            rows = table[
                (table["run"] == run["name"])
                & (table["site"] == data["sites"][lines["site"][line]])
                & (table["role"] == data["roles"][lines["role"][line]])
                & (table["head"].fillna(-1) == lines["head"][line])
            ].sort_values("step")
            np.testing.assert_array_equal(rows["step"], steps)
            for name, packed in values.items():
                own = packed[offset : offset + len(steps)]
                np.testing.assert_array_equal(own, rows[name].to_numpy(np.float32))
            offset += len(steps)
            seen += len(rows)
    assert seen == len(table)
    assert offset == len(values["delta_magnitude"])


def test_the_coupling_table_says_what_coupling_finds(recorded: tuple[list[Path], Page]) -> None:
    runs, page = recorded
    text = " ".join(" ".join(page.text).split())
    late = dd.select_checkpoints(dd.load_runs(runs), count=4, kind="late")
    for level in ("pooled", "within_step", "within_layer"):
        for signed in (False, True):
            table = dd.coupling(late, level=level, signed=signed, permutations=0)
            for row in table.to_dict("records"):
                low, high = row["pearson_low"], row["pearson_high"]
                said = f"{row['pearson']:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
                assert said in text


def test_every_method_is_diagnosed_against_the_others(recorded: tuple[list[Path], Page]) -> None:
    (dora, ft), page = recorded
    text = " ".join(" ".join(page.text).split())
    for run, other, method in ((dora, ft, "DoRA"), (ft, dora, "FT")):
        expected = diagnose([run], [other], method=method)
        verdict, sure = str(expected).splitlines()[:2]
        assert verdict.removesuffix(".") in text
        assert sure in text
        for sentence in (*expected.found, *expected.advice, *expected.warnings):
            assert " ".join(sentence.split()) in text
        for measure in expected.table.get("measure", []):
            assert measure in text


def test_one_method_is_diagnosed_against_what_is_given(tmp_path: Path) -> None:
    runs = {
        name: make_run(tmp_path / name, name, layers=4, roles=("query",), seed=seed)
        for seed, name in enumerate(("FT", "LoRA", "DoRA"))
    }
    page = written(tmp_path / "r.html", runs["DoRA"], reference=[runs["FT"], runs["LoRA"]])
    assert "Compared with FT, LoRA." in "".join(page.text)
    alone = written(tmp_path / "r.html", runs["DoRA"])
    assert "Compared with the project's own recorded runs." in "".join(alone.text)
    elsewhere = make_run(tmp_path / "elsewhere", layers=4, roles=("up",))
    page = written(tmp_path / "r.html", elsewhere)
    assert "Compared with nothing." in "".join(page.text)


@pytest.mark.parametrize(("layers", "folded"), [(100, False), (101, True)])
def test_the_legend_of_many_layers_is_one_stop_of_the_keyboard(
    tmp_path: Path, layers: int, folded: bool
) -> None:
    run = make_run(tmp_path / "ft", layers=layers, roles=("query",), steps=(0, 1))
    page = written(tmp_path / "r.html", run)
    assert ("101 layers" in page.text) == folded
    boxes = [a for tag, a, _ in page.elements if tag == "input" and a.get("name") == "layer"]
    assert len(boxes) == layers


def test_a_run_without_a_finite_row_is_said_to_have_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ft", layers=4, roles=("query",))
    table = pd.read_csv(run / "trajectory.csv")
    table[["delta_magnitude", "delta_direction"]] = np.nan
    table.to_csv(run / "trajectory.csv", index=False)
    text = " ".join("".join(written(tmp_path / "r.html", run).text).split())
    assert "not enough data" in text
    assert "Compared with nothing." in text
    assert "has no weight of role" not in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.38, "+0.380"),
        (-0.8, "−0.800"),
        (1.2e-5, "+1.20e−05"),
        (-1690.4, "−1,690"),
        (99.99, "+100"),
        (0.0, "+0.00"),
    ],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert three_digits(value) == shown


def test_a_hundred_sites_at_a_thousand_steps_stay_below_six_megabytes() -> None:
    assert 100 * 1000 * len(MEASURES) <= MOST_VALUES  # of one run no step is left out
    series = lay_out(many_rows(100, 1000, ("FT", "LoRA")))
    names, numbered = names_of(series)
    full = packing.floats(np.random.default_rng(0).random(MOST_POINTS))
    units = KeptUnits(data={"turned": full, "changed": full})
    data = as_script_json(page_data(series, names, numbered, [], units))
    figures = figures_json(panels.panels(3, 3, heads=range(3), units=True))
    assert len(data) + len(figures) + len(panels.library()) + 300_000 < 6e6


def test_an_older_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    run = make_run(tmp_path / "ft", layers=4, roles=("query",))
    dd.write_report(run, out)
    first = out.read_bytes()
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        dd.write_report([run, tmp_path], out)
    assert out.read_bytes() == first
    dd.write_report(run, out, title="Again")
    assert b"<h1>Again</h1>" in out.read_bytes()
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


def test_runs_without_a_row_after_step_0_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "start", steps=(0,))
    with pytest.raises(InputError, match="no row after step 0"):
        dd.write_report(run, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_rows_that_name_another_run_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ft")
    text = (run / "run.json").read_text().replace('"run": "ft"', '"run": "other"')
    (run / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"rows of run 'ft' belong to no run\.json"):
        dd.write_report(run, tmp_path / "report.html")


def test_damaged_units_are_a_warning_and_not_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ft", layers=3, roles=("query",), keep_units=4)
    (run / "units" / "step-40.safetensors").write_bytes(b"damaged")
    page = written(tmp_path / "report.html", run)
    assert "The units of ft cannot be read" in "".join(page.text)


def test_without_the_extra_one_sentence_names_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ft")
    code = (
        "import sys; sys.modules['bokeh'] = None; sys.modules['jinja2'] = None\n"
        "from dora_dynamics.cli import main\n"
        f"main(['report', {str(run)!r}, '--out', {str(tmp_path / 'r.html')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'dora-dynamics[report]'" in done.stderr


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ft", layers=3, roles=("query",))
    out = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["report", str(run), "--out", str(out), "--title", "Mine"])
    assert result.exit_code == 0, result.output
    assert result.output == f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB).\n"
    assert "<h1>Mine</h1>" in out.read_text(encoding="utf-8")
    wrong = CliRunner().invoke(main, ["report", str(run), "--out", str(tmp_path / "page.pdf")])
    assert wrong.exit_code == 2
    assert "must end in .html" in wrong.output
