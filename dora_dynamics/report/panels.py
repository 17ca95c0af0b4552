"""The empty Bokeh figures of the page; `page/charts.js` fills them from the packed arrays.

No name that comes from a run enters a Bokeh model here: names stand in the page's HTML, escaped,
and reach tooltips as data, which Bokeh shows as text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from bokeh.document import Document
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColumnDataSource,
    HoverTool,
    LinearColorMapper,
    Range1d,
    TapTool,
)
from bokeh.models.annotations import ColorBar, Span
from bokeh.plotting import figure
from bokeh.resources import Resources

from dora_dynamics.plotting._style import LINE_COLOUR

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from bokeh.models.renderers import GlyphRenderer

Kind = Literal["paper", "steps", "trajectories", "heat", "by_layer", "cloud", "heads"]

MOST_ROLE_ROWS: Final = 3
"""Up to so many roles have a row of panels each; more share one row, with a choice of role."""

_POINT: Final = [("weight", "@site"), ("run", "@run"), ("layer", "@layer"), ("step", "@step{0,0}")]
_TIPS: Final[dict[Kind, list[tuple[str, str]]]] = {
    "paper": [*_POINT, ("ΔD", "@x{%.4g}"), ("ΔM", "@y{%.4g}")],
    "steps": [*_POINT, ("ΔD", "@x{%.4g}"), ("ΔM", "@y{%.4g}")],
    "by_layer": [*_POINT, ("r across units", "@r{%+.2f}"), ("slope", "@slope{%.4g}")],
    "cloud": [("1 − cos", "@x{%.4g}"), ("m′ − m₀", "@change{%.4g}")],
    "trajectories": [
        *_POINT[:3],
        ("step", "$snap_x{0,0}"),
        ("value", "$snap_y{%.4g}"),
    ],
}
_PRINTED: Final[dict[str, Any]] = dict.fromkeys(
    ["@x", "@y", "@r", "@slope", "@change", "$snap_y"], "printf"
)
_MOST_TIPS: Final = 2
"""Points below the pointer that are named at once; a heap of them would hide the page."""
_TEXT: Final = {
    "paper": ("ΔD", "ΔM"),
    "steps": ("ΔD", "ΔM"),
    "trajectories": ("step", None),
    "heat": ("recorded step", "layer"),
    "by_layer": ("layer", None),
    "cloud": ("1 − cos(w′, w₀)", "|m′ − m₀|"),
    "heads": ("head", "layer"),
}
_POINTS: Final[dict[str, list[Any]]] = {
    "x": [], "y": [], "site": [], "run": [], "layer": [], "step": [], "colour": [], "marker": [],
    "size": [], "r": [], "slope": [], "change": [], "series": [],
}  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """A place on the page for one figure.

    Attributes:
        id: of the HTML element and name of the figure.
        kind: which chart it belongs to.
        method: number of the method it shows; None where it does not depend on one.
        role: number of the role it shows; None for the one that the reader chose.
        measure: what a heat map shows.
    """

    id: str
    kind: Kind
    method: int | None = None
    role: int | None = None
    measure: str | None = None

    @property
    def height(self) -> int:
        """Height in pixels; the width is that of its place."""
        return {"cloud": 380, "heat": 240, "heads": 260, "by_layer": 230}.get(self.kind, 280)


def panels(
    methods: int, roles: int, *, heads: Collection[int] = (), units: bool = False
) -> list[Panel]:
    """The panels of a page, chart by chart; in a chart role by role, then method by method.

    Args:
        methods: how many there are.
        roles: how many there are.
        heads: the methods with rows by attention head.
        units: whether a run kept its units.
    """
    rows: list[int | None] = [*range(roles)] if roles <= MOST_ROLE_ROWS else [None]
    kinds: list[tuple[Kind, str | None]] = [
        ("paper", None),
        ("steps", None),
        ("trajectories", None),
        ("heat", "delta_magnitude"),
        ("heat", "delta_direction"),
        ("by_layer", None),
    ]
    if heads:
        kinds.append(("heads", None))
    found = [
        Panel(
            "-".join(map(str, filter(None, [kind, measure, f"{number}", f"{method}"]))),
            kind,
            method,
            role,
            measure,
        )
        for kind, measure in kinds
        for number, role in enumerate(rows)
        for method in range(methods)
        if kind != "heads" or method in heads
    ]
    if units:
        found.append(Panel("cloud", "cloud"))
    return found


def documents(shown: Iterable[Panel]) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures as Bokeh's JSON, and the element that each of its roots goes into."""
    document = Document()
    roots = {}
    with document.models.freeze():  # or each root would have all models looked through again
        for panel in shown:
            drawn = _figure(panel)
            document.add_root(drawn)
            roots[str(drawn.id)] = panel.id
    return {"page": dict(document.to_json(deferred=False))}, roots


def library() -> str:
    """BokehJS, its core alone: no widgets, no tables, no MathJax, no WebGL."""
    core = Resources(mode="inline", components=["bokeh"])
    return "\n".join(text for text in core.js_raw if text)


def _figure(panel: Panel) -> figure:
    x_text, y_text = _TEXT[panel.kind]
    plot = figure(
        name=panel.id,
        height=panel.height,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        min_border_top=6,
        min_border_right=14,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_line_color = LINE_COLOUR
    plot.xaxis.axis_label = x_text
    if y_text is not None:
        plot.yaxis.axis_label = y_text
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=5)
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=3)
    zoom = BoxZoomTool()
    plot.add_tools(zoom)
    plot.toolbar.active_drag = zoom
    _CONTENT[panel.kind](plot, panel)
    return plot


def _source(panel: Panel, what: str, data: dict[str, list[Any]]) -> ColumnDataSource:
    return ColumnDataSource(name=f"{panel.id}:{what}", data={key: [] for key in data})


def _scatter(plot: figure, panel: Panel) -> None:
    source = _source(panel, "points", _POINTS)
    drawn = plot.scatter(
        "x",
        "y",
        source=source,
        marker="marker",
        size="size",
        fill_color="colour",
        fill_alpha=0.85,
        line_color="white",
        line_width=0.6,
    )
    drawn.nonselection_glyph = None
    ring = plot.scatter(
        "x",
        "y",
        source=_source(panel, "ring", {"x": [], "y": []}),
        marker="circle",
        size=17,
        fill_color=None,
        line_width=2.2,
    )
    ring.level = "overlay"
    ring.tags = ["ink"]
    _point_at(plot, panel, drawn, point_policy="snap_to_data")


def _point_at(plot: figure, panel: Panel, drawn: GlyphRenderer[Any], **policy: Any) -> None:
    """What is drawn tells what it is where one points at it, and can be chosen."""
    tips = HoverTool(
        renderers=[drawn],
        tooltips=_TIPS[panel.kind],
        formatters=_PRINTED,
        limit=_MOST_TIPS,
        **policy,
    )
    plot.add_tools(tips, TapTool(renderers=[drawn]))


def _paper(plot: figure, panel: Panel) -> None:
    fit = _source(panel, "line", {"x": [], "y": []})
    plot.line("x", "y", source=fit, line_width=2).tags = ["ink"]
    _scatter(plot, panel)


def _steps(plot: figure, panel: Panel) -> None:
    paths = _source(panel, "paths", {"xs": [], "ys": [], "colour": []})
    plot.multi_line("xs", "ys", source=paths, line_color="colour", line_alpha=0.35, line_width=1)
    plot.x_range, plot.y_range = Range1d(start=0, end=1), Range1d(start=0, end=1)
    _scatter(plot, panel)


def _by_layer(plot: figure, panel: Panel) -> None:
    plot.y_range = Range1d(start=-1.05, end=1.05)
    plot.add_layout(Span(location=0, dimension="width", line_width=1, tags=["ink"]))
    _scatter(plot, panel)


def _cloud(plot: figure, panel: Panel) -> None:
    _scatter(plot, panel)


def _trajectories(plot: figure, panel: Panel) -> None:
    columns: dict[str, list[Any]] = {
        name: [] for name in ("xs", "ys", "colour", "site", "run", "layer", "series", "dash")
    }
    lines = plot.multi_line(
        "xs",
        "ys",
        source=_source(panel, "lines", columns),
        line_color="colour",
        line_dash="dash",
        line_alpha=0.85,
        line_width=1.4,
    )
    lines.nonselection_glyph = None
    plot.multi_line(
        "xs",
        "ys",
        source=_source(panel, "ring", {"xs": [], "ys": []}),
        line_width=3.5,
    ).tags = ["ink"]
    plot.add_layout(
        Span(dimension="height", location=0, line_width=1, line_dash="dashed", tags=["ink", "now"])
    )
    _point_at(plot, panel, lines, line_policy="nearest")


def _image(plot: figure, panel: Panel) -> None:
    mapper = LinearColorMapper(palette="Viridis256", low=0, high=1, nan_color="rgba(0,0,0,0)")
    plot.image(
        "image",
        x="x",
        y="y",
        dw="dw",
        dh="dh",
        source=_source(panel, "image", {name: [] for name in ("image", "x", "y", "dw", "dh")}),
        color_mapper=mapper,  # type: ignore[call-arg]  # Bokeh takes what the glyph takes
    )
    plot.x_range, plot.y_range = Range1d(start=0, end=1), Range1d(start=0, end=1)
    plot.grid.visible = False
    if panel.kind == "heat":
        plot.add_layout(Span(dimension="height", location=0, line_width=1.5, tags=["ink", "now"]))
    bar = ColorBar(
        color_mapper=mapper,
        width=9,
        padding=4,
        background_fill_color=None,
        ticker=BasicTicker(desired_num_ticks=4),
    )
    plot.add_layout(bar, "right")


_CONTENT: Final = {
    "paper": _paper,
    "steps": _steps,
    "trajectories": _trajectories,
    "heat": _image,
    "heads": _image,
    "by_layer": _by_layer,
    "cloud": _cloud,
}
