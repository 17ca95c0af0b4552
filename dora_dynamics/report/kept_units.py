"""Section "Inside the matrices": the units of the runs that kept them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from dora_dynamics.report import packing
from dora_dynamics.runs.directory import RunDirectoryError
from dora_dynamics.runs.snapshots import load_units

if TYPE_CHECKING:
    from dora_dynamics.decomposition import UnitChange
    from dora_dynamics.report.recorded import Recorded, Run

MOST_POINTS: Final = 80_000
"""Units a page carries; of larger weights a random part is taken."""
_FEWEST: Final = 16


@dataclass
class KeptUnits:
    """The units of a report.

    Attributes:
        snapshots: for each run and kept step, its sites and where their units begin.
        data: the packed arrays of all of them, one behind the other.
        sampled: whether some units were left out.
        problems: what could not be read, in words.
    """

    snapshots: list[dict[str, object]] = field(default_factory=list)
    data: dict[str, object] | None = None
    sampled: bool = False
    problems: list[str] = field(default_factory=list)


def kept_units(recorded: Recorded, most_points: int = MOST_POINTS) -> KeptUnits:
    """The units at the last of the late checkpoints that each run kept."""
    found = KeptUnits()
    read: list[tuple[Run, int, dict[str, UnitChange]]] = []
    for run in recorded.runs:
        if "units" not in run.info.keep:
            continue
        late = recorded.late.loc[recorded.late["run"] == run.name, "step"]
        step = int(late.max())
        try:
            units = load_units(run.path, step)
        except (RunDirectoryError, KeyError, OSError) as error:
            found.problems.append(f"The units of {run.name} cannot be read: {error}")
        else:
            read.append((run, step, _in_order(units, run.info.sites)))
    weights = sum(len(units) for _, _, units in read)
    most = max(_FEWEST, most_points // max(1, weights))
    rng = np.random.default_rng(0)
    turned: list[np.ndarray] = []
    changed: list[np.ndarray] = []
    begin = 0
    for run, step, units in read:
        sites = []
        for site, change in units.items():
            total = len(change)
            usable = np.flatnonzero(change.has_direction & change.is_finite)
            if len(usable) > most:
                usable = np.sort(rng.choice(usable, most, replace=False))
                found.sampled = True
            turned.append(change.one_minus_cosine[usable])
            changed.append(change.magnitude_difference[usable])
            sites.append({"site": site, "begin": begin, "count": len(usable), "units": total})
            begin += len(usable)
        found.snapshots.append({"run": run.name, "step": step, "sites": sites})
    if begin:
        found.data = {
            "turned": packing.floats(np.concatenate(turned)),
            "changed": packing.floats(np.concatenate(changed)),
        }
    return found


def _in_order(units: dict[str, UnitChange], sites: list[str]) -> dict[str, UnitChange]:
    """The units by site as the model has them; the file has the sites in order of the alphabet."""
    first = [site for site in sites if site in units]
    return {site: units[site] for site in dict.fromkeys([*first, *units])}
