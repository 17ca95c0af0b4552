"""Runs of which it is known what makes ΔM, as the tests of the diagnosis take them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import dora_dynamics as dd
from analyses.synthetic_runs import Design, Kind

if TYPE_CHECKING:
    import pandas as pd

diagnose = partial(dd.diagnose, resamples=200)


DESIGNS: dict[Kind, Design] = {
    "turning": Design("turning", 0.1),
    "own magnitude": Design("own magnitude", 0.05, own=1.5),
    "decay": Design("decay", 0.01, total_decay=0.05),
    "noise": Design("noise", 0.003),
}


def runs_of(table: pd.DataFrame, *numbers: int, method: str | None = None) -> pd.DataFrame:
    chosen = table[table["run"].str[-1].isin([str(number) for number in numbers])]
    return chosen if method is None else chosen.assign(method=method)
