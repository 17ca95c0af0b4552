"""The runs a method is compared with: the user's own, or the project's recorded ones."""

from __future__ import annotations

from importlib import resources
from typing import Any, Final

import numpy as np
import pandas as pd

from dora_dynamics.trajectory import validate

TABLE: Final = "reference_runs.csv"
ABOUT: Final = "reference_runs.json"


def recorded_runs(*, decays: bool) -> pd.DataFrame:
    """The project's own runs of FT, LoRA and DoRA: four late checkpoints of each.

    Args:
        decays: those with weight decay, or those without.

    Returns:
        A trajectory, as `analyses.reference_runs` packaged it.
    """
    with resources.files("dora_dynamics").joinpath("data", TABLE).open(encoding="utf-8") as lines:
        table = pd.read_csv(lines)
    kept = table[table["decays"].astype(bool) == decays]
    return validate(kept.drop(columns="decays")).reset_index(drop=True)


def same_weights(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Whether two trajectories follow the same sites of the same pre-trained weights."""

    def magnitudes(table: pd.DataFrame) -> pd.Series[Any]:
        head = table["head"].fillna(-1) if "head" in table else -1
        keyed = table.assign(head=head)
        return keyed.groupby(["site", "role", "head"])["magnitude_before"].mean().sort_index()

    own, other = magnitudes(first), magnitudes(second)
    if not own.index.equals(other.index):
        return False
    return bool(np.allclose(own.to_numpy(), other.to_numpy(), rtol=1e-3))
