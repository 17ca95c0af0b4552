"""What is wrong with what a user gave is always an `InputError`."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.checkpoints.errors import CheckpointError
from dora_dynamics.effective import NoDenseWeightError
from dora_dynamics.errors import InputError
from dora_dynamics.recording.baseline_source import BaselineError
from dora_dynamics.runs.directory import RunDirectoryError
from dora_dynamics.sites import NoHeadsError, NoSiteMatchesError, UnknownAxisError
from dora_dynamics.trajectory import TrajectoryError


@pytest.mark.parametrize(
    "error",
    [
        BaselineError,
        CheckpointError,
        NoDenseWeightError,
        NoHeadsError,
        NoSiteMatchesError,
        RunDirectoryError,
        TrajectoryError,
        UnknownAxisError,
    ],
)
def test_the_package_s_own_errors_have_one_root(error: type[Exception]) -> None:
    assert issubclass(error, InputError)


def test_a_module_without_a_dense_weight_is_also_a_type_error() -> None:
    assert issubclass(NoDenseWeightError, TypeError)


def test_arguments_that_cannot_be_used() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(InputError, match="rank must be at least 1"):
        dd.apply_lora(model, ["0"], rank=0)
    with pytest.raises(InputError, match="no linear layer matches"):
        dd.Recorder(model, ["query"], every=1)
    with pytest.raises(InputError, match="every must be at least 1"):
        dd.Recorder(model, ["0"], every=0)
    with pytest.raises(InputError, match="shape"):
        dd.weight_change(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(InputError, match="lacks what is needed"):
        dd.coupling(pd.DataFrame({"method": ["FT"], "role": ["query"]}))
    with pytest.raises(InputError, match="has no column"):
        dd.plotting.magnitude_direction(pd.DataFrame({"method": ["FT"]}))
