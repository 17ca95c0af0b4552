"""What a diagnosis works on: the rows of the method and of its references, or what is lacking."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import pandas as pd

from dora_dynamics.diagnosis.references import recorded_runs, same_weights
from dora_dynamics.errors import InputError
from dora_dynamics.statistics import layer_codes, select_checkpoints
from dora_dynamics.trajectory import typed

if TYPE_CHECKING:
    from dora_dynamics.statistics.cell import IntArray

Runs: TypeAlias = pd.DataFrame | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

MINIMUM_LAYERS: Final = 4
RECORDED: Final = "recorded"
_MEASURES: Final = ("delta_magnitude", "delta_direction")
_ORDER: Final = ("run", "layer", "stack", "role", "site", "head", "step")
_NEEDED: Final = (
    *("run", "method", "step", "site", "role", *_MEASURES, "signed_delta_magnitude"),
    *("magnitude_before", "unit_coupling", "signed_unit_coupling", "unit_slope"),
    *("radial_share", "total_decay"),
)


@dataclass(frozen=True)
class Lack:
    """Why there is not enough data, and what to do about it."""

    found: str
    advice: str


@dataclass(frozen=True)
class Material:
    """The rows to diagnose and those to compare with.

    Attributes:
        method: name of the method.
        own: its rows at late checkpoints, with finite measures.
        compared: those of them whose roles the references have too.
        references: for each reference method, its rows of these roles at late checkpoints.
        binding: whether the references are the user's own, so that they enter the verdict.
        paired: whether all follow the same sites of the same pre-trained weights.
        lacking: why this is not enough data; empty where it is.
        notes: what limits the comparison, in sentences.
    """

    method: str
    own: pd.DataFrame
    compared: pd.DataFrame
    references: dict[str, pd.DataFrame]
    binding: bool
    paired: bool
    lacking: tuple[Lack, ...]
    notes: tuple[str, ...]

    @property
    def runs(self) -> int:
        """How many runs of the method there are."""
        return int(self.own["run"].nunique())

    @property
    def layers(self) -> int:
        """How many layers they follow."""
        return int(layer_codes(self.own).max(initial=-1)) + 1

    @property
    def steps(self) -> tuple[int, ...]:
        """The checkpoints that are used."""
        return tuple(int(step) for step in np.unique(self.own["step"]))

    @property
    def repeated(self) -> bool:
        """Whether any method was run more than once."""
        return any(t["run"].nunique() > 1 for t in (self.own, *self.references.values()))

    def layer_numbers(self, tables: dict[str, pd.DataFrame]) -> list[IntArray]:
        """Number of each row's layer, for each table; of one count where they are paired."""
        if not self.paired:
            return [layer_codes(table) for table in tables.values()]
        codes = layer_codes(pd.concat(tables.values(), ignore_index=True))
        ends = np.cumsum([len(table) for table in tables.values()])
        return np.split(codes, ends[:-1])


def gather(
    trajectory: Runs, reference: Runs | str | None, method: str | None, checkpoints: int
) -> Material:
    """Find the rows of the method and of its references, and say what is lacking.

    Raises:
        InputError: as `diagnose`.
    """
    table = _table(trajectory, "trajectory")
    methods = list(dict.fromkeys(table["method"]))
    if method is None and len(methods) != 1:
        raise InputError(
            f"the trajectory holds {len(methods)} methods ({', '.join(methods)}): name the one to "
            "diagnose with method=."
        )
    name = methods[0] if method is None else method
    if name not in methods:
        raise InputError(f"no rows of method {name!r}; there are {', '.join(methods)}.")
    rows, others = table[table["method"] == name], table[table["method"] != name]
    own = _usable(rows, checkpoints)
    notes: list[str] = []
    lost = len(rows[rows["step"] > 0]) - len(_finite(rows))
    if lost:
        notes.append(f"{lost} rows are left out: their weights are not finite or did not change.")

    if own.empty:
        return Material(name, own, own, {}, True, False, tuple(_lacking(rows, own)), tuple(notes))

    binding = True
    if isinstance(reference, str) and reference == RECORDED:
        against, binding = others, not others.empty
        if others.empty:
            against = _recorded(own, notes)
    elif reference is None:
        against = others
    else:
        against = pd.concat([others, _table(reference, "reference")], ignore_index=True)

    own, seen = _without_copies(own, {}, notes)
    kept = {}
    for key, group in against.groupby("method", sort=False):
        usable = _usable(group, checkpoints)
        if usable.empty:
            notes.append(
                f"the reference's {key} has no late checkpoint with a weight that is finite and "
                "changed: not compared."
            )
            continue
        distinct, _ = _without_copies(usable, seen if key == name else {}, notes)
        if not distinct.empty:
            kept[str(key)] = distinct
    if binding and name in kept:
        notes.append(f"the reference holds runs of {name!r} too; they are a reference as well.")
    references, compared = _common_roles(own, kept, notes)
    lacking = tuple(_lacking(rows, own))
    paired = bool(references) and all(same_weights(compared, t) for t in references.values())
    paired = paired and len(compared) == len(own)
    return Material(name, own, compared, references, binding, paired, lacking, tuple(notes))


def _table(runs: Runs, what: str) -> pd.DataFrame:
    if not isinstance(runs, pd.DataFrame):
        from dora_dynamics.diagnosis.effective_rank import load_with_rank

        paths = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
        runs = load_with_rank(paths)
    missing = [column for column in _NEEDED if column not in runs.columns]
    if missing:
        raise InputError(f"the {what} lacks the column(s) {', '.join(missing)}.")
    if runs.empty:
        raise InputError(f"the {what} has no rows.")
    runs = typed(runs)
    place = ["run", "step", "site", "role", *(["head"] if "head" in runs else [])]
    repeated = runs.duplicated(["method", *place])
    if repeated.any():
        run, step, site = runs.loc[repeated, ["run", "step", "site"]].iloc[0]
        raise InputError(
            f"two rows of the {what} describe the same point (run {run}, step {step}, site "
            f"{site}): give every run a name of its own."
        )
    return runs


def _finite(rows: pd.DataFrame) -> pd.DataFrame:
    values = rows[list(_MEASURES)].to_numpy(dtype=np.float64, na_value=np.nan)
    changed = (rows["delta_magnitude"] > 0).to_numpy() & (rows["magnitude_before"] > 0).to_numpy()
    kept: pd.DataFrame = rows[
        np.isfinite(values).all(axis=1) & changed & (rows["step"] > 0).to_numpy()
    ]
    return kept


def _usable(rows: pd.DataFrame, checkpoints: int) -> pd.DataFrame:
    """Rows at late checkpoints that have something to say, in an order of their own.

    Whatever order runs are given in, the resamples draw the same ones.
    """
    late = select_checkpoints(rows, count=checkpoints, kind="late")
    order = [name for name in _ORDER if name in rows]
    return _finite(late).sort_values(order, kind="stable", ignore_index=True)


def _without_copies(
    rows: pd.DataFrame, seen: dict[bytes, str], notes: list[str]
) -> tuple[pd.DataFrame, dict[bytes, str]]:
    """One of any runs of a method that hold the same numbers, so that a copy is no evidence.

    Args:
        rows: of one method, in the order of `_usable`.
        seen: the runs that count already, by what they hold.
        notes: where copies are told.

    Returns:
        The rows of runs that are no copies, and `seen` with these.
    """
    what = [name for name in (*_ORDER[1:], *_MEASURES, "signed_delta_magnitude") if name in rows]
    seen, copies = dict(seen), []
    for key, run in rows.groupby("run", sort=False):
        held = pd.util.hash_pandas_object(run[what], index=False).to_numpy().tobytes()
        if held in seen:
            copies.append(key)
            notes.append(f"run {key} holds the same numbers as {seen[held]}: counted once.")
        seen.setdefault(held, str(key))
    return rows[~rows["run"].isin(copies)].reset_index(drop=True), seen


def _recorded(own: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The project's own runs, as the method was trained; no rows where they have no role of it."""
    against = recorded_runs(decays=bool((own["total_decay"] > 0).any()))
    wanted = "Record FT and LoRA with your recipe and pass them as the reference."
    roles, theirs = sorted(set(own["role"])), sorted(set(against["role"]))
    if not set(roles) & set(theirs):
        notes.append(
            f"compared with nothing: the project's own runs follow {', '.join(theirs)}, and these "
            f"{', '.join(roles)}. {wanted}"
        )
        return against[:0]
    notes.append(
        "compared with the project's own runs (MiniLM, docstrings): model, task and recipe differ "
        f"from yours, so that a difference can be theirs. {wanted}"
    )
    return against


def _common_roles(
    own: pd.DataFrame, references: dict[str, pd.DataFrame], notes: list[str]
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """References that can be compared, and the rows of the method they are compared with."""
    roles = set(own["role"])
    kept = {}
    for name, table in references.items():
        if not roles & set(table["role"]):
            notes.append(
                f"the reference's {name} has no weight of role {', '.join(sorted(roles))}: "
                "not compared."
            )
        elif int(layer_codes(table).max(initial=-1)) + 1 < MINIMUM_LAYERS:
            notes.append(
                f"the reference's {name} has fewer than {MINIMUM_LAYERS} layers: not compared."
            )
        else:
            kept[name] = table
    common = roles.intersection(*(set(table["role"]) for table in kept.values()))
    if kept and not common:
        notes.append("no role is in all references: none is compared.")
        return {}, own
    if common < roles:
        notes.append(f"compared with the references by {', '.join(sorted(common))} only.")
    kept = {
        name: table[table["role"].isin(common)].reset_index(drop=True)
        for name, table in kept.items()
    }
    return kept, own[own["role"].isin(common)].reset_index(drop=True)


def _lacking(rows: pd.DataFrame, used: pd.DataFrame) -> Iterable[Lack]:
    if not (rows["step"] > 0).any():
        yield Lack(
            "There are no rows after step 0.", "Record the method while it trains, or later in it."
        )
        return
    if used.empty:
        yield Lack(
            "No late checkpoint has a weight that is finite and changed.",
            "Check that the followed weights are the ones that train.",
        )
        return
    layers = int(layer_codes(used).max()) + 1
    if layers < MINIMUM_LAYERS:
        yield Lack(
            f"The layers are what varies, and there are {layers}; {MINIMUM_LAYERS} are needed.",
            "Follow more layers (targets=), or take a deeper model.",
        )
    if used["unit_coupling"].notna().sum() == 0 and used["delta_direction"].max() == 0:
        yield Lack(
            "No weight has turned: ΔD is zero everywhere.",
            "Check that the adapter trains; nothing but its magnitudes has changed.",
        )
