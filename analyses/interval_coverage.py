"""Run: `python -m analyses.interval_coverage --draws 200` (ten minutes).

How often the intervals of `coupling` hold the true value, in a simulation.

Layers, layers within runs, and rows within these carry normal random effects (standard deviations
1, 0.5 and 0.3) on ΔD and ΔM that correlate by `rho`; both measures also grow over four steps. The
truth is the estimate from 20,000 layers. Writes `interval_coverage.csv`: the share of draws in
which each interval held it, for 6 and 12 layers and 1, 3 and 5 runs.
"""

from __future__ import annotations

import argparse
import itertools
import platform
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import pandas as pd

from dora_dynamics.statistics import Interval, Level, coupling

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = 4


def simulate(
    draws: int, layers: int, runs: int, rho: float, rng: np.random.Generator
) -> pd.DataFrame:
    """Trajectories of independent draws, told apart by the column `draw`."""
    shape = (draws, runs, layers, STEPS)
    draw, run, layer, step = (axis.ravel() for axis in np.indices(shape))
    mixing = np.linalg.cholesky([[1, rho], [rho, 1]])

    def effect(size: float, *shape: int) -> np.ndarray:
        return size * np.tensordot(mixing, rng.standard_normal((2, *shape)), axes=1)

    shared = effect(1.0, draws, 1, layers, 1) + effect(0.5, draws, runs, layers, 1)
    x, y = (shared + effect(0.3, *shape) + np.arange(STEPS) / 2).reshape(2, -1)
    inside = np.tanh(rho + (shared + effect(0.3, *shape))[0].ravel() / 2)
    return pd.DataFrame(
        {"draw": draw, "run": run, "step": step + 1, "site": layer, "layer": layer}
        | {"delta_direction": x, "delta_magnitude": y, "units": 1}
        | dict.fromkeys(["unit_coupling", "unit_rank_coupling", "unit_slope"], inside)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the simulation and write its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=200, help="simulated studies per setting")
    parser.add_argument("--truth-layers", type=int, default=20_000, help="layers behind the truth")
    parser.add_argument("--resamples", type=int, default=400, help="resamples of the bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)

    rows = []
    truth = {}
    for layers, runs, rho in itertools.product((6, 12), (1, 3, 5), (0.0, 0.8)):
        rng = np.random.default_rng([options.seed, layers, runs, round(10 * rho)])
        table = simulate(options.draws, layers, runs, rho, rng)
        for level, interval in itertools.product(get_args(Level), get_args(Interval)):
            if (rho, level) not in truth:
                many = simulate(
                    1, options.truth_layers, 1, rho, np.random.default_rng(options.seed)
                )
                one_layer = many.assign(layer=0)  # so that there is no interval to wait for
                truth[rho, level] = estimate(one_layer, level)
            found = estimate(table, level, interval, options.resamples)
            for name in ("pearson", "spearman", "slope"):
                low, high = found[f"{name}_low"], found[f"{name}_high"]
                true = float(truth[rho, level][name].iloc[0])
                rows.append(
                    {"layers": layers, "runs": runs, "rho": rho, "level": level}
                    | {"interval": interval, "statistic": name, "truth": true}
                    | {"coverage": ((low <= true) & (true <= high)).mean()}
                    | {"median_width": (high - low).median()}
                )
        print(f"{layers} layers, {runs} runs, rho {rho}: done", flush=True)

    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions["pandas"] = pd.__version__
    record = {"draws": options.draws, "resamples": options.resamples, "seed": options.seed}
    options.out.mkdir(parents=True, exist_ok=True)
    result = pd.DataFrame(rows).assign(**record, **versions)
    result.to_csv(options.out / "interval_coverage.csv", index=False, float_format="%.4f")
    overview = result.pivot_table(
        "coverage", ["interval", "level", "layers"], ["statistic", "runs"]
    )
    print(overview.round(3).to_string())


def estimate(
    table: pd.DataFrame, level: Level, interval: Interval = "bootstrap", resamples: int = 1
) -> pd.DataFrame:
    """The coupling of every draw, without p-values."""
    return coupling(table, "draw", level, interval=interval, resamples=resamples, permutations=0)


if __name__ == "__main__":
    main()
