"""Section "Before you read on": what could mislead a reader of these very runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pandas as pd

from dora_dynamics.report.recorded import CHECKPOINTS
from dora_dynamics.statistics.intervals import MINIMUM_LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dora_dynamics.report.recorded import Recorded, Run

_DECAY_ALONE: Final = (0.8, 1.25)
"""Signed ΔM over what decay alone gives: between these, decay explains it."""
_NAMED: Final = 3


@dataclass(frozen=True)
class Caution:
    """One thing to keep in mind.

    Attributes:
        about: one or two words: axis, baseline, decay, …
        text: one or two sentences.
        kind: "warning" changes how the figures read; "note" is good to know.
    """

    about: str
    text: str
    kind: Literal["warning", "note"] = "warning"


def cautions(recorded: Recorded) -> list[Caution]:
    """All cautions about the runs, warnings before notes."""
    found = [
        *_non_finite(recorded),
        *_few_points(recorded),
        *_copies(recorded),
        *_decay(recorded),
        *_baselines(recorded),
        *_axis(recorded),
        *_incomplete(recorded),
        *_zero_units(recorded),
    ]
    return sorted(found, key=lambda caution: caution.kind != "warning")


def _axis(recorded: Recorded) -> Iterator[Caution]:
    axis = recorded.runs[0].info.axis
    if axis == "input":
        yield Caution(
            "axis",
            "One magnitude per input feature was measured. The paper, and DoRA itself, have one "
            "per output feature: these numbers are not comparable with theirs.",
        )
    else:
        yield Caution("axis", "One magnitude per output feature, as in the paper.", "note")


def _baselines(recorded: Recorded) -> Iterator[Caution]:
    runs = recorded.runs
    for what, values in (
        ("baseline", {run.info.baseline for run in runs}),
        ("model", {run.info.model for run in runs}),
    ):
        if len(values) > 1:
            yield Caution(
                what,
                f"The runs name {len(values)} different {what}s: {_listed(sorted(values))}. "
                "Differences between methods may be differences between these.",
            )
    for run in runs:
        if "quantised" in run.info.baseline:
            yield Caution(
                "baseline",
                f"{run.name} was measured from quantised weights ({run.info.baseline}): changes "
                "smaller than a step of the quantisation are not what training did.",
            )
    if len({run.info.baseline for run in runs}) == 1:
        text = f"W₀ is {runs[0].info.baseline}, in all runs."
        yield Caution("baseline", text, "note")


def _decay(recorded: Recorded) -> Iterator[Caution]:
    unknown = []
    for run in recorded.runs:
        rows = _last_rows(recorded, run)
        decay = rows["total_decay"].to_numpy(dtype=np.float64)
        if np.isnan(decay).all():
            unknown.append(run.name)
            continue
        alone = rows["magnitude_before"].to_numpy(dtype=np.float64) * np.expm1(-decay)
        signed = rows["signed_delta_magnitude"].to_numpy(dtype=np.float64)
        usable = np.isfinite(alone) & np.isfinite(signed) & (alone < 0)
        if not usable.any():
            continue
        ratio = float(np.median(signed[usable] / alone[usable]))
        given = f"Λ = Σ lr·weight_decay = {np.nanmax(decay):.3g}"
        if _DECAY_ALONE[0] <= ratio <= _DECAY_ALONE[1]:
            yield Caution(
                "decay",
                f"{run.name}: weight decay alone ({given}) accounts for ΔM: the median weight has "
                f"{ratio:.0%} of the shrinkage that decay gives. A slope here says how ΔD differs "
                "between layers, not how learning couples ΔM and ΔD; compare with a run without "
                "decay.",
            )
        else:
            yield Caution(
                "decay",
                f"{run.name}: {given}; the median weight's signed ΔM is {ratio:+.2f} times what "
                "decay alone would give.",
                "note",
            )
    if unknown:
        yield Caution(
            "decay",
            f"How much weight decay acted is not known for {_listed(unknown)} (checkpoints do not "
            "tell, nor does the training of some adapters and optimizers): ΔM may be what decay "
            "alone gives.",
        )


def _non_finite(recorded: Recorded) -> Iterator[Caution]:
    for run in recorded.runs:
        rows = recorded.table[(recorded.table["run"] == run.name)]
        bad = rows[rows["non_finite"] > 0]
        if len(bad):
            yield Caution(
                "NaN or Inf",
                f"{run.name}: {len(bad):,} rows hold NaN or Inf in the weights, from step "
                f"{bad['step'].min():,} on ({_listed(list(dict.fromkeys(bad['site'])))}). They "
                "are left out of every figure and number here.",
            )


def _zero_units(recorded: Recorded) -> Iterator[Caution]:
    zero = recorded.table[recorded.table["zero_units"] > 0]
    if len(zero):
        sites = list(dict.fromkeys(zero["site"]))
        yield Caution(
            "zero units",
            f"Some units have no norm, or hardly any, hence no direction: in ΔM, left out of ΔD "
            f"({_listed(sites)}).",
            "note",
        )


def _few_points(recorded: Recorded) -> Iterator[Caution]:
    table = recorded.table
    few = []
    for (method, role), rows in table.groupby(["method", "role"], sort=False):
        layers = rows[["layer", "stack"]].drop_duplicates()
        count = len(layers) if rows["layer"].notna().all() else rows["site"].nunique()
        if count < MINIMUM_LAYERS:
            few.append(f"{method}, {role}: {count}")
    if few:
        yield Caution(
            "too few points",
            f"Fewer than {MINIMUM_LAYERS} layers ({_listed(few, 8)}): correlations there have no "
            "interval, and mean little.",
        )
    short = [
        run.name
        for run in recorded.runs
        if recorded.late.loc[recorded.late["run"] == run.name, "step"].nunique() < CHECKPOINTS
    ]
    if short:
        yield Caution(
            "too few points",
            f"Fewer than {CHECKPOINTS} recorded steps after step 0 in {_listed(short)}.",
        )
    single = [
        str(method)
        for method, runs in table.groupby("method", sort=False)["run"].nunique().items()
        if runs == 1
    ]
    if single:
        yield Caution(
            "one run",
            f"{_listed(single, 8)}: one run each. The intervals are over layers alone; how much "
            "another seed would change is not in them.",
        )


def _copies(recorded: Recorded) -> Iterator[Caution]:
    """Runs of one method that hold the same numbers: no more evidence than one of them."""
    late = recorded.late
    runs: dict[tuple[str, bytes], list[str]] = {}
    for name, rows in late.groupby("run", sort=False):
        held = rows[["step", "site", "head", "delta_magnitude", "delta_direction"]]
        numbers = np.sort(pd.util.hash_pandas_object(held, index=False).to_numpy()).tobytes()
        runs.setdefault((str(rows["method"].iloc[0]), numbers), []).append(str(name))
    for same in runs.values():
        if len(same) > 1:
            yield Caution(
                "copies",
                f"{_listed(same)} hold the same numbers. The diagnosis counts them once, but the "
                "intervals of the couplings take them for runs of their own, and are too narrow.",
            )


def _incomplete(recorded: Recorded) -> Iterator[Caution]:
    for path in recorded.empty:
        yield Caution("empty run", f"{path.as_posix()} holds no rows yet and is left out.")
    ends = {run.name: int(_last_rows(recorded, run)["step"].max()) for run in recorded.runs}
    if len(set(ends.values())) > 1:
        listed = [f"{name}: {step:,}" for name, step in ends.items()]
        yield Caution(
            "different lengths",
            f"The runs end at different steps ({_listed(listed, 8)}). Both measures grow with "
            "training, so compare their sizes with care.",
        )
    for run in recorded.runs:
        counts = recorded.table[recorded.table["run"] == run.name].groupby("step").size()
        partial = counts[counts < counts.max()]
        if len(partial):
            yield Caution(
                "incomplete steps",
                f"{run.name}: {len(partial):,} steps lack some weights (the first is "
                f"{partial.index[0]:,}): was the run interrupted?",
            )


def _last_rows(recorded: Recorded, run: Run) -> pd.DataFrame:
    rows = recorded.table[recorded.table["run"] == run.name]
    last: pd.DataFrame = rows[rows["step"] == rows["step"].max()]
    return last


def _listed(names: Sequence[str], most: int = _NAMED) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
