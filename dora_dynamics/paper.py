"""What the DoRA paper reports: the points of its Figures 2 and 5, and the correlations of its text.

Source: Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv:2402.09353v1 (ICML 2024).
"""

from __future__ import annotations

from importlib import resources
from typing import Final, Literal

import numpy as np
import pandas as pd

from dora_dynamics.errors import InputError

_FILE: Final = "paper_figures_2_and_5.csv"
_STEPS: Final = {"inter step 1": 1, "inter step 2": 2, "inter step 3": 3, "final step": 4}

FIGURES: Final = {"query": 2, "value": 5}
"""The paper's figure of each role."""


def published_points(labels: Literal["printed", "reordered"] = "printed") -> pd.DataFrame:
    """The 288 points of Figures 2 (query) and 5 (value), as a trajectory.

    They were read from the vector graphics of the figures; the least-squares slopes of these points
    equal those of the lines drawn there to three decimals. The model is VL-BART: six layers in each
    of two stacks, encoder and decoder, and four checkpoints.

    The labels as printed are doubtful. In that order every four consecutive points lie close
    together, and in both figures of FT each of these twelve groups rises in ΔD and in ΔM from its
    second point to its third, its fourth and its first: what one weight does over its checkpoints
    when they are sorted by name ("final step" before "inter step 1"). Read so, the groups are
    stack 1 and stack 2 of layer 1, of layer 2, and so on, and their values change smoothly from
    layer to layer. Pooled estimates are the same either way; those within a checkpoint, and
    intervals that keep layers whole, are not.

    Args:
        labels: "printed" for checkpoint, layer and stack as the data file has them; "reordered" for
            those that the order of the points suggests, which is a conjecture.

    Returns:
        Columns of `dora_dynamics.trajectory`: run ("paper"), method, step (1 to 3 intermediate, 4
        final: the order of the checkpoints, not optimizer steps), site, layer (from 0; the paper
        counts from 1), stack ("1" or "2": the figures do not say which is the encoder), role,
        delta_magnitude, delta_direction. Ordered by role, method, step, stack and layer.
    """
    if labels not in ("printed", "reordered"):
        raise InputError(f"labels {labels!r} is unknown; choose 'printed' or 'reordered'.")
    with resources.files("dora_dynamics").joinpath("data", _FILE).open(encoding="utf-8") as lines:
        printed = pd.read_csv(lines)
    points = pd.DataFrame(
        {
            "run": "paper",
            "method": printed["method"],
            "step": printed["checkpoint"].map(_STEPS),
            "layer": printed["layer"] - 1,
            "stack": printed["stack"].astype(str),
            "role": printed["matrix"],
            "delta_magnitude": printed["delta_magnitude"],
            "delta_direction": printed["delta_direction"],
        }
    )
    if labels == "reordered":
        order = points.groupby(["role", "method"], sort=False).cumcount().to_numpy()
        weight, checkpoint = np.divmod(order, 4)
        layer, stack = np.divmod(weight, 2)
        points["step"] = np.where(checkpoint == 0, 4, checkpoint)
        points["layer"], points["stack"] = layer, (stack + 1).astype(str)
    points.insert(
        3,
        "site",
        "stack_"
        + points["stack"]
        + ".layers."
        + points["layer"].astype(str)
        + "."
        + points["role"],
    )
    methods = pd.CategoricalDtype(["FT", "LoRA", "DoRA"])
    keys = points.assign(method=points["method"].astype(methods))
    keys = keys.sort_values(["role", "method", "step", "stack", "layer"])
    return points.loc[keys.index].reset_index(drop=True)


def published_correlations() -> pd.DataFrame:
    """The correlations of (ΔD, ΔM) that the paper's text gives, for the query matrices only.

    They differ from those of the points in its own Figure 2: see `analyses.paper_figures`.

    Returns:
        Columns method, role and paper, the correlation.
    """
    claims = {"FT": -0.62, "LoRA": 0.83, "DoRA": -0.31}
    return pd.DataFrame({"method": list(claims), "role": "query", "paper": list(claims.values())})
