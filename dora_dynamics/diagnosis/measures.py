"""What a diagnosis reads off a trajectory: each measure, its scale, and how much of it matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from dora_dynamics.correlation import FloatArray

Scale = Literal["plain", "fisher_z", "asinh"]

LARGEST_SHARE: Final = 2.0  # of ΔM: what larger ones say is that other parts work against them
_LARGEST_R: Final = 0.99


@dataclass(frozen=True)
class Measure:
    """One kind of evidence.

    Attributes:
        name: how the evidence table calls it.
        meaning: what it is, in one line.
        scale: where it is averaged and compared. Correlations: Fisher's z, |r| above 0.99 counting
            as 0.99. Slopes: asinh, since their spread grows with their size.
        margin: smallest difference on that scale that counts as one; NaN where runs are not
            compared by it.
    """

    name: str
    meaning: str
    scale: Scale = "plain"
    margin: float = float("nan")

    def transform(self, values: FloatArray) -> FloatArray:
        """Values on the scale they are compared on."""
        if self.scale == "fisher_z":
            return np.arctanh(np.clip(values, -_LARGEST_R, _LARGEST_R))
        return np.arcsinh(values) if self.scale == "asinh" else values

    def restore(self, values: FloatArray) -> FloatArray:
        """The opposite of `transform`."""
        if self.scale == "fisher_z":
            return np.tanh(values)
        return np.sinh(values) if self.scale == "asinh" else values


LEVELS: Final = ("pooled", "within_step", "within_layer")

MEASURES: Final[tuple[Measure, ...]] = (
    Measure("r pooled", "r of ΔD and ΔM over all points, as in the paper", "fisher_z", 0.1),
    Measure("r within_step", "r across layers, at one checkpoint", "fisher_z", 0.1),
    Measure("r within_layer", "r across checkpoints, in one layer", "fisher_z", 0.1),
    Measure("r units", "r across the units inside a weight", "fisher_z", 0.1),
    Measure("signed r units", "r units with signed ΔM", "fisher_z", 0.1),
    Measure("slope within_step", "slope across layers, in units of m₀", "asinh", 0.2),
    Measure("slope units", "slope across units, in units of m₀; turning alone: 1", "asinh", 0.2),
    Measure("signed ΔM / m₀", "relative change of the magnitude; negative: it shrinks"),
    Measure("signed ΔM / ΔM", "1 if all units grow, −1 if all shrink", "plain", 0.05),
    Measure("radial share", "share of ‖W' − W₀‖² along the units' own directions", "plain", 0.02),
    Measure("decay share", "ΔM that weight decay alone gives, over ΔM", "plain", 0.05),
    Measure("turning share", "ΔM that turning alone gives, over ΔM", "plain", 0.05),
    Measure("effective rank", "of W' − W₀, over the largest possible", "plain", 0.05),
)

BY_NAME: Final = {measure.name: measure for measure in MEASURES}


def row_measures(frame: pd.DataFrame) -> dict[str, FloatArray]:
    """The measures that every row has by itself, and what the rules need besides.

    With d = 1 − exp(−Λ), the share of a weight that decay has taken, and T = ΔD/(1 − ΔD), the share
    that an update orthogonal to w_0 adds to its norm:

    - `decay share` is d·m_0/ΔM, `turning share` T·m_0/ΔM.
    - `decay fit` is the signed ΔM over −d·m_0, and `decay and turning fit` over
      ((1 − d)/(1 − ΔD) − 1)·m_0, the larger one of an update and a decay that both act on W.
    - `own radial share` is the radial share times 1 − (decay share)²: what is along the units' own
      directions and not by decay.
    - `growth` is (signed ΔM + d·m_0)/ΔM: which way magnitudes go once decay is made good.

    Args:
        frame: rows of a trajectory.

    Returns:
        Arrays of shape (rows,), NaN where undefined; `effective rank` where the column is there.
    """

    def column(name: str) -> FloatArray:
        return frame[name].to_numpy(dtype=np.float64, na_value=np.nan)

    m_0, change, signed = (
        column(name) for name in ("magnitude_before", "delta_magnitude", "signed_delta_magnitude")
    )
    turned = column("delta_direction")
    decayed = -np.expm1(-column("total_decay"))
    with np.errstate(all="ignore"):
        turning = turned / (1 - turned)
        decay_share = np.clip(decayed * m_0 / change, 0.0, LARGEST_SHARE)
        by_decay = np.where(decayed > 0, signed / (-decayed * m_0), np.nan)
        predicted = (1 - decayed) / (1 - turned) - 1
        by_both = np.where((decayed > 0) & (predicted < 0), signed / (predicted * m_0), np.nan)
        found = {
            "r units": column("unit_coupling"),
            "signed r units": column("signed_unit_coupling"),
            "slope units": column("unit_slope") / m_0,
            "signed ΔM / m₀": signed / m_0,
            "signed ΔM / ΔM": signed / change,
            "radial share": column("radial_share"),
            "decay share": decay_share,
            "turning share": np.clip(turning * m_0 / change, 0.0, LARGEST_SHARE),
            "decay fit": by_decay,
            "decay and turning fit": by_both,
            "own radial share": column("radial_share") * (1 - np.minimum(decay_share, 1.0) ** 2),
            "growth": (signed + decayed * m_0) / change,
        }
    if "effective_rank" in frame:
        found["effective rank"] = column("effective_rank")
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}
