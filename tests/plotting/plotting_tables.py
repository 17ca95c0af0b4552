from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence


def trajectory(
    methods: Sequence[str] = ("FT", "LoRA", "DoRA"),
    *,
    layers: int = 6,
    steps: Sequence[int] = (0, 100, 200, 300, 400),
    roles: Sequence[str] = ("query",),
    runs: int = 1,
    stacks: Sequence[str] = ("encoder", "decoder"),
) -> pd.DataFrame:
    """A table of smooth paths with noise; at step 0 nothing has changed."""
    rng = np.random.default_rng(0)
    records = []
    for method in methods:
        for run in range(runs):
            for role in roles:
                for stack in stacks:
                    for layer in range(layers):
                        speed = rng.uniform(0.5, 1.5)
                        for step in steps:
                            direction = speed * step / max(*steps, 1)
                            signed = -0.3 * direction + 0.02 * rng.normal() * (step > 0)
                            records.append(
                                {
                                    "run": f"{method}-{run}",
                                    "method": method,
                                    "step": step,
                                    "site": f"{stack}.{layer}.{role}",
                                    "layer": layer,
                                    "stack": stack,
                                    "role": role,
                                    "delta_direction": direction,
                                    "delta_magnitude": abs(signed),
                                    "signed_delta_magnitude": signed,
                                }
                            )
    return pd.DataFrame(records)
