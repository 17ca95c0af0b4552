"""One self-contained HTML page of a set of runs, for a browser without a network.

`recorded` reads the runs, `series` lays their rows out as matrices, `packing` makes them compact,
and one file a section says what the page shows. Sections hold words and numbers; `page/` holds the
template, the style and the script, and `panels` the empty Bokeh figures that the script fills.
"""

from dora_dynamics.report.errors import ReportError as ReportError
from dora_dynamics.report.writing import write_report as write_report

__all__ = ["ReportError", "write_report"]
