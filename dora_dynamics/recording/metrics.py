"""A few numbers of one recorded step, for a trainer's own log."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

METRICS: Final = ("delta_magnitude", "delta_direction", "unit_coupling")
"""The columns of the table whose means over a role are logged."""


def role_means(rows: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Mean of each of `METRICS` over the sites of each role: `dora_dynamics/<role>/<column>`.

    Values that are NaN are left out, and with them means of nothing else.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for column in METRICS:
            value = float(str(row[column]))
            if math.isfinite(value):
                found[f"dora_dynamics/{row['role']}/{column}"].append(value)
    return {name: math.fsum(values) / len(values) for name, values in sorted(found.items())}
