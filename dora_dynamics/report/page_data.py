"""What the page's script works with: the packed numbers, and the names they belong to, once."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dora_dynamics.report import packing
from dora_dynamics.report.paper_figure import MARKERS, Fit
from dora_dynamics.report.series import MEASURES, RunSeries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dora_dynamics.report.kept_units import KeptUnits
    from dora_dynamics.report.names import Names


def page_data(
    series: Sequence[RunSeries],
    names: Names,
    numbered: Sequence[pd.DataFrame],
    fitted: Sequence[Sequence[Fit]],
    units: KeptUnits,
) -> dict[str, Any]:
    """The content of the page's data element; every number and every name stands in it once."""
    lines = pd.concat(numbered, ignore_index=True)
    runs, first = [], 0
    for one in series:
        runs.append(
            {
                "name": one.run,
                "method": names.methods.index(one.method),
                "first": first,
                "count": len(one.keys),
                "steps": packing.integers(one.steps),
                "checkpoints": one.checkpoints.tolist(),
            }
        )
        first += len(one.keys)
    return {
        "methods": names.methods,
        "roles": names.roles,
        "sites": names.sites,
        "layers": [asdict(layer) for layer in names.layers],
        "rows": names.rows,
        "runs": runs,
        "markers": MARKERS,
        "lines": {name: packing.integers(lines[name]) for name in lines.columns},
        "measures": {
            name: {
                "title": title,
                "values": packing.floats(
                    np.concatenate([one.values[name].ravel() for one in series])
                ),
            }
            for name, title in MEASURES.items()
        },
        "fits": [[asdict(fit) for fit in row] for row in fitted],
        "units": {"snapshots": units.snapshots, "data": units.data},
    }
