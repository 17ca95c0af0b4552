"""Put the page together from its sections and write it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dora_dynamics
from dora_dynamics import provenance
from dora_dynamics.plotting._rows import in_order
from dora_dynamics.report import packing
from dora_dynamics.report.cautions import Caution, cautions
from dora_dynamics.report.couplings import coupling_lines, coupling_table
from dora_dynamics.report.diagnoses import diagnoses
from dora_dynamics.report.errors import ReportError
from dora_dynamics.report.kept_units import kept_units
from dora_dynamics.report.names import Names, names_of
from dora_dynamics.report.page_data import page_data
from dora_dynamics.report.paper_figure import checkpoint_names, fits
from dora_dynamics.report.recorded import Recorded, read
from dora_dynamics.report.series import MEASURES, MOST_VALUES, RunSeries, lay_out
from dora_dynamics.report.what_was_run import facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dora_dynamics.report.panels import Panel
    from dora_dynamics.report.paper_figure import Fit
    from dora_dynamics.runs.directory import StrPath

_SCRIPTS: Final = (
    "unpack.js",
    "model.js",
    "ticks.js",
    "charts.js",
    "tables.js",
    "look.js",
    "main.js",
)
_TITLE: Final = "How fine-tuning changed the weights"
_SHAPES: Final = {
    "triangle": "M0-4.6L4.6 3.6H-4.6Z",
    "square": "M-3.9-3.9H3.9V3.9H-3.9Z",
    "diamond": "M0-5L4 0L0 5L-4 0Z",
    "circle": "M-4.4 0A4.4 4.4 0 1 0 4.4 0A4.4 4.4 0 1 0-4.4 0Z",
}
_KIND_IN_WORDS: Final = {
    "paper": "Scatter of ΔM against ΔD at the late checkpoints",
    "steps": "Scatter of ΔM against ΔD at the step of the slider",
    "trajectories": "Lines of the chosen measure over the steps",
    "heat": "Heat map of layers and steps",
    "by_layer": "r across units by layer",
    "cloud": "Scatter of |m′ − m₀| against 1 − cos of the units of one weight",
    "heads": "Heat map of layers and heads",
}


def write_report(
    runs: StrPath | Iterable[StrPath],
    out: StrPath,
    *,
    reference: StrPath | Iterable[StrPath] | None = None,
    title: str | None = None,
    all_steps: bool = False,
) -> Path:
    """Write one self-contained HTML page of some runs, which opens without a network.

    It shows what was run, what to be careful about, the diagnosis, the paper's figure, the points
    step by step, trajectories, heat maps of layers × steps, couplings with intervals, the units
    inside the matrices and, where rows are by head, the heads. The page carries the measures as
    float32; every name from a run is escaped, and the page's policy lets no script run but its own.

    Args:
        runs: run directories, or one.
        out: the file to write; missing folders are made, an older file is replaced as a whole.
        reference: run directories of full fine-tuning and LoRA that the diagnosis compares with;
            by default the project's recorded ones.
        title: of the page.
        all_steps: carry every recorded step, however large the page becomes; by default steps of
            long runs are left out evenly, and the page says so.

    Returns:
        The written file.

    Raises:
        ReportError: the extra `report` is not installed, or the runs hold nothing to show.
        RunDirectoryError: no run directory was given, one is not a run, or their axes differ.
    """
    render = _renderer()
    recorded = read(runs)
    compared = None if reference is None else read(reference)
    page = render(
        recorded, compared, title or _TITLE, most_values=None if all_steps else MOST_VALUES
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(page.encode("utf-8", "replace"))
    partial.replace(path)
    return path


def _renderer() -> Any:
    try:
        import bokeh  # noqa: F401
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ReportError(
            "a report needs Bokeh and Jinja2: pip install 'dora-dynamics[report]'."
        ) from error
    return _render


def _render(
    recorded: Recorded, reference: Recorded | None, title: str, *, most_values: int | None
) -> str:
    from dora_dynamics.report import panels

    series = lay_out(recorded, most_values)
    names, numbered = names_of(series)
    coupling = coupling_table(recorded)
    fitted = fits(recorded, coupling, names)
    units = kept_units(recorded)
    by_head = set(recorded.table.loc[recorded.table["head"].notna(), "method"])
    has_heads = bool(by_head)
    shown = panels.panels(
        len(names.methods),
        len(names.roles),
        heads=[names.methods.index(method) for method in by_head],
        units=units.data is not None,
    )
    scripts = [panels.library(), _own_script()]
    lines = coupling_lines(coupling)
    diagnosed = diagnoses(recorded, reference)
    content = {
        "title": title,
        "lede": _lede(recorded),
        "version": dora_dynamics.__version__,
        "written": provenance.now(),
        "policy": _policy(scripts),
        "style": _trusted(_file("page.css")),
        "scripts": [_trusted(script) for script in scripts],
        "data": _trusted(as_script_json(page_data(series, names, numbered, fitted, units))),
        "figures": _trusted(figures_json(shown)),
        "facts": facts(recorded),
        "cautions": [
            *(Caution("units", problem) for problem in units.problems),
            *cautions(recorded),
        ],
        "diagnoses": diagnosed,
        "couplings": [
            (signed, [line for line in lines if line.signed == signed]) for signed in (False, True)
        ],
        "charts": _charts(shown, names, fitted),
        "methods": names.methods,
        "roles": names.roles,
        "layers": names.layers,
        "measures": MEASURES,
        "dynamic_role": len(names.roles) > panels.MOST_ROLE_ROWS,
        "checkpoints": checkpoint_names(series),
        "shapes": _SHAPES,
        "snapshots": units.snapshots,
        "sampled": units.sampled,
        "axis": recorded.runs[0].info.axis,
        "what": "weight (or head)" if has_heads else "weight",
        "replicates": len(series) > len(names.methods),
        "thinned": _thinned(series),
    }
    content["sections"] = _sections(heads=has_heads)
    page: str = _template().render(content)
    return page


def as_script_json(content: object) -> str:
    """JSON for a script element: no character in it can end the element or begin a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def figures_json(shown: Sequence[Panel]) -> str:
    """The empty figures and where each belongs, for the page's script."""
    from dora_dynamics.report import panels

    docs, roots = panels.documents(shown)
    packed = packing.text(json.dumps(docs, allow_nan=False))
    return as_script_json(
        {"docs": packed, "roots": roots, "panels": [asdict(panel) for panel in shown]}
    )


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_file("page.html.j2"))


def _trusted(text: str) -> Any:
    """Text of the package's own making, or made safe by `as_script_json`, that is not escaped."""
    from markupsafe import Markup

    return Markup(text)


def _file(name: str) -> str:
    return (resources.files("dora_dynamics.report") / "page" / name).read_text(encoding="utf-8")


def _own_script() -> str:
    body = "\n".join(_file(name) for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{body}\n}})();\n'


def _policy(scripts: Sequence[str]) -> str:
    """What the page may do: run these very scripts, and load nothing from anywhere."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )


def _lede(recorded: Recorded) -> str:
    methods = in_order(recorded.table["method"])
    models = list(dict.fromkeys(run.info.model for run in recorded.runs))
    count = len(recorded.runs)
    sites = recorded.table["site"].nunique()
    return (
        f"{count} {'run' if count == 1 else 'runs'} ({', '.join(methods)}) of "
        f"{' and '.join(models)}: {sites:,} weights, up to step {recorded.table['step'].max():,}."
    )


def _thinned(series: Sequence[RunSeries]) -> str:
    left_out = [one for one in series if len(one.steps) < one.recorded]
    if not left_out:
        return ""
    one = max(left_out, key=lambda run: run.recorded)
    return (
        f"The page carries {len(one.steps):,} of the {one.recorded:,} recorded steps, evenly "
        "chosen; the coupling table uses the recorded rows."
    )


def _sections(*, heads: bool) -> list[tuple[str, str]]:
    found = [
        ("runs", "What was run"),
        ("cautions", "Before you read on"),
        ("diagnosis", "Diagnosis"),
        ("paper", "ΔM against ΔD"),
        ("steps", "Step by step"),
        ("trajectories", "Trajectories"),
        ("heat", "Layers × steps"),
        ("coupling", "Coupling"),
        ("units", "Units"),
    ]
    return [*found, ("heads", "Heads")] if heads else found


def _charts(
    shown: Sequence[Panel], names: Names, fitted: Sequence[Sequence[Fit]]
) -> dict[str, dict[str, Any] | None]:
    """The panels as the template lays them out: chart by chart, in rows of methods."""
    charts: dict[str, dict[str, Any] | None] = {"heads": None, "cloud": None}
    for panel in shown:
        chart = charts.get(panel.kind)
        if chart is None:
            chart = charts[panel.kind] = {"id": panel.kind, "rows": []}
        rows = chart["rows"]
        place = (panel.measure, panel.role)
        if not rows or rows[-1]["place"] != place:
            rows.append({"place": place, "panels": []})
        rows[-1]["panels"].append(_described(panel, names, fitted))
    return charts


def _described(panel: Panel, names: Names, fitted: Sequence[Sequence[Fit]]) -> dict[str, Any]:
    method = "" if panel.method is None else names.methods[panel.method]
    role = "" if panel.role is None else names.roles[panel.role]
    title = ", ".join(filter(None, [method, role]))
    stat, label = "", f"{_KIND_IN_WORDS[panel.kind]}: {title or 'chosen above'}."
    if panel.kind == "paper" and panel.method is not None and panel.role is not None:
        fit = fitted[panel.role][panel.method]
        stat = "; ".join(filter(None, (fit.r, fit.rest)))
        label += f" {stat}."
    return {
        **asdict(panel),
        "height": panel.height,
        "title": title,
        "stat": stat,
        "dynamic_role": panel.kind != "cloud" and panel.role is None,
        "label": f"{label} Arrow keys go from one to the next; the table below has the numbers.",
    }
