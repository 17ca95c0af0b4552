"""The runs that the tests of the diagnosis share."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analyses.synthetic_runs import KINDS, Kind, pretrained, study
from tests.diagnosis.kinds import DESIGNS, runs_of


@pytest.fixture(scope="session")
def tables() -> dict[Kind, pd.DataFrame]:
    """Four runs of each kind, from one set of pre-trained weights in six layers."""
    rng = np.random.default_rng(7)
    weights = pretrained(6, rng)
    return {kind: study(DESIGNS[kind], weights, 4, rng, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def references(tables: dict[Kind, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(
        [
            runs_of(tables["turning"], 2, 3, method="LoRA"),
            runs_of(tables["own magnitude"], 2, 3, method="FT"),
        ]
    )
