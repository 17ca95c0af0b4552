"""The trajectory: one tidy table of magnitude and direction changes over sites and steps.

Everything to the right of the measuring code (statistics, plotting, diagnosis, report) reads this
table and nothing else. Every column below has one documented meaning and one type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    Column("layer", "integer", "layer number within the stack, from 0; missing where there is none"),
    Column("stack", "text", "encoder, decoder, vision, …; empty where the model has one stack"),
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
    Column("radial_share", "number", "share of ‖W' − W_0‖² along the units' own directions, 0 to 1"),
    Column("total_decay", "number", "Λ = Σ lr·weight_decay so far on what sets the magnitude"),
    Column("zero_units", "integer", "units of zero norm: in ΔM, left out of ΔD"),
    Column("non_finite", "integer", "units holding NaN or Inf; if any, the measures are NaN"),
)

COLUMN_NAMES: Final[tuple[str, ...]] = tuple(column.name for column in COLUMNS)
