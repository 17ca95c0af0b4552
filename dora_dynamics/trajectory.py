"""The trajectory: one tidy table of magnitude and direction changes over sites and steps.

Everything to the right of the measuring code (statistics, plotting, diagnosis, report) reads this
table and nothing else. Every column below has one documented meaning and one type.

What becomes of unusual weights:

- NaN or Inf in a weight, fp16 overflow: `non_finite` counts the units, and the measures of that row
  are NaN; other rows are as ever.
- Weights that explode: exact as long as their squares fit float64.
- Units of zero norm: counted in `zero_units`; in ΔM, left out of ΔD, which is NaN where all are.
- Units that shrink more than a billionfold: exact in ΔM; what is left of them has lost its
  direction to rounding, so that they count as units of zero norm: in `zero_units`, not in ΔD. By
  the factors of a LoRA or DoRA, those that its update makes shrink by more than 100,000.
- Weights that stay: ΔM and ΔD exactly 0; couplings NaN.
- Denormal weights, and turns below what fp32 can say: exact, in memory and on disk.
- Steps that a gradient scaler skips are no steps: not counted, no rows.
- Another parameter of the same shape in the weight's place: followed, against the same W_0.
- A weight of another shape, or on the meta device, in training: its own rows are NaN, with all
  units in `non_finite`, and one warning says why; other rows are as ever; `strict=True` raises.
  Where weights are sharded, that holds if one process cannot measure its part.
- Tied weights, and a module that is used in several places: one row, under the first name that was
  selected. `run.json` has the others (`also_known_as`), and each of them selects it.
- Gradient checkpointing, `torch.compile`, a second recorder: the same training, the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, Literal

import pandas as pd

from dora_dynamics.errors import InputError
from dora_dynamics.units.summary import UnitSummary, summary_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dora_dynamics.decomposition import WeightChange
    from dora_dynamics.sites import Site

SCHEMA_VERSION: Final = 1

Kind = Literal["text", "integer", "number"]


@dataclass(frozen=True)
class Column:
    """One column of the trajectory: its name, what kind of value it holds, what it means."""

    name: str
    kind: Kind
    meaning: str


COLUMNS: Final[tuple[Column, ...]] = (
    Column("run", "text", "name of the run; runs of one method are its replicates (seeds)"),
    Column("method", "text", "FT, LoRA, DoRA or the user's own name for the method"),
    Column("step", "integer", "optimizer steps done when the row was taken; 0 is before the first"),
    Column("site", "text", "path of the module whose weight is followed"),
    Column(
        "layer", "integer", "layer number within the stack, from 0; missing where there is none"
    ),
    Column(
        "stack", "text", "encoder, decoder, vision, … as the site's path says; empty if it does not"
    ),
    Column("role", "text", "query, key, value, output, …; the module's own name where unknown"),
    Column("head", "integer", "attention head, where rows are taken per head; missing otherwise"),
    Column("units", "integer", "number of units (output features with axis='output')"),
    Column("delta_magnitude", "number", "ΔM, Eq. 3: mean over units of |m' − m_0|"),
    Column("delta_direction", "number", "ΔD, Eq. 4: mean over units of 1 − cos(w', w_0)"),
    Column("signed_delta_magnitude", "number", "mean over units of m' − m_0"),
    Column("relative_delta_magnitude", "number", "mean over units of |m' − m_0| / m_0"),
    Column("magnitude_before", "number", "mean over units of m_0"),
    Column("update_norm", "number", "Frobenius norm of W' − W_0"),
    Column("unit_coupling", "number", "Pearson r of |m' − m_0| and 1 − cos across the units"),
    Column("unit_rank_coupling", "number", "Spearman ρ of the same pairs"),
    Column("unit_slope", "number", "least-squares slope of |m' − m_0| on 1 − cos across the units"),
    Column("signed_unit_coupling", "number", "Pearson r of m' − m_0 and 1 − cos across the units"),
    Column("signed_unit_rank_coupling", "number", "Spearman ρ of the same pairs"),
    Column("signed_unit_slope", "number", "least-squares slope of m' − m_0 on 1 − cos"),
    Column(
        "radial_share", "number", "share of ‖W' − W_0‖² along the units' own directions, 0 to 1"
    ),
    Column("total_decay", "number", "Λ = Σ lr·weight_decay so far on what sets the magnitude"),
    Column(
        "zero_units",
        "integer",
        "units of zero norm, or shrunk more than a billionfold: in ΔM, left out of ΔD",
    ),
    Column(
        "non_finite",
        "integer",
        "units holding NaN or Inf, all where the weight could not be measured; if any, the "
        "measures are NaN",
    ),
)

COLUMN_NAMES: Final[tuple[str, ...]] = tuple(column.name for column in COLUMNS)
_in_order: Final = itemgetter(*COLUMN_NAMES)


class TrajectoryError(InputError):
    """A table is not a trajectory: a column is missing or holds what it cannot hold."""


def trajectory_row(
    site: Site,
    change: WeightChange | UnitSummary,
    *,
    run: str,
    method: str,
    step: int,
    total_decay: float = float("nan"),
    head: int | None = None,
) -> dict[str, object]:
    """One row of the trajectory from the measured change of one site.

    Args:
        site: the weight that was measured.
        change: its change since the baseline, or what is left of it for a row.
        run: name of the run.
        method: name of the fine-tuning method.
        step: optimizer steps done.
        total_decay: Λ so far, NaN where it is not known.
        head: attention head, where the change is that of one head.

    Returns:
        A value for each of `COLUMN_NAMES`.
    """
    summary = change if isinstance(change, UnitSummary) else summary_of(change)
    values = vars(summary) | {
        "run": run,
        "method": method,
        "step": step,
        "site": site.name,
        "layer": site.layer,
        "stack": site.stack,
        "role": site.role,
        "head": head,
        "total_decay": total_decay,
    }
    return dict(zip(COLUMN_NAMES, _in_order(values), strict=True))


def to_table(rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
    """A trajectory from its rows, with every column in its place and of its type."""
    return validate(pd.DataFrame(list(rows), columns=list(COLUMN_NAMES)))


def validate(table: pd.DataFrame) -> pd.DataFrame:
    """A copy of `table` with the columns of a trajectory in their order and types.

    Columns beyond those of a trajectory are kept, behind them.

    Raises:
        TrajectoryError: a column is missing, or holds a value of the wrong kind.
    """
    missing = [name for name in COLUMN_NAMES if name not in table.columns]
    if missing:
        raise TrajectoryError(f"the table lacks the column(s) {', '.join(missing)}.")
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()].unique()
        raise TrajectoryError(f"the table has the column(s) {', '.join(twice)} more than once.")
    extra = [name for name in table.columns if name not in COLUMN_NAMES]
    return typed(table)[[*COLUMN_NAMES, *extra]]


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """A copy of `table`, those columns of a trajectory that it has in their types.

    Raises:
        TrajectoryError: a column holds a value of the wrong kind.
    """
    found = table.copy()
    for column in COLUMNS:
        if column.name not in table.columns:
            continue
        try:
            found[column.name] = _typed(table[column.name], column)
        except (TypeError, ValueError) as error:
            raise TrajectoryError(
                f"column {column.name!r} must hold {_KIND_IN_WORDS[column.kind]}: {error}."
            ) from error
    return found


_OPTIONAL_INTEGERS: Final = frozenset({"layer", "head"})
_KIND_IN_WORDS: Final[dict[Kind, str]] = {
    "text": "text",
    "integer": "whole numbers",
    "number": "numbers",
}


def _typed(values: pd.Series[Any], column: Column) -> pd.Series[Any]:
    if column.kind == "text":
        return values.fillna("").astype(str)
    numbers = pd.to_numeric(values)
    if column.kind == "number":
        return numbers.astype("float64")
    present = numbers.dropna()
    fractional = present[present % 1 != 0]
    if len(fractional):
        raise ValueError(f"{fractional.iloc[0]} is none")
    return numbers.astype("Int64" if column.name in _OPTIONAL_INTEGERS else "int64")
