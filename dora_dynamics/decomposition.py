"""Magnitude and direction of a weight, and how a change splits into the two (Eq. 2 to 4).

This module knows tensors only. A weight of shape (out, in), as `torch.nn.Linear` stores it, has
one magnitude per output unit: `axis="output"`, the axis of the DoRA paper and of its authors' code.
`axis="input"` takes columns instead, one magnitude per input feature.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, Literal, get_args

import numpy as np
import torch

from dora_dynamics import _kernels
from dora_dynamics.errors import InputError
from dora_dynamics.units.arithmetic import (
    LEAST_LEFT,
    LEAST_LEFT_BY_FACTORS,
    MEASURES,
    Measures,
    has_direction,
    measures,
    named,
    rescaled,
    terms,
    unit_arrays,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Axis = Literal["output", "input"]
AXES: Final[tuple[Axis, ...]] = get_args(Axis)


@dataclass(frozen=True)
class UnitChange:
    """The change of each unit of one weight; every array is float64 of shape (units,).

    Attributes:
        magnitude_before: m_0, the norm of the unit before.
        magnitude_after: m', its norm after.
        magnitude_difference: m' − m_0, accurate also where the two agree to many digits.
        one_minus_cosine: 1 − cos(w', w_0), from 0 to 2; NaN where either norm is zero, or so little
            is left of it that rounding has taken its direction: less than 1e-9 of m_0; 1e-5 where
            a low-rank update takes the rest away.
        update_square: squared norm of w' − w_0.
        radial_update: length of w' − w_0 along w_0, negative where the unit shrank along it.
    """

    magnitude_before: NDArray[np.float64]
    magnitude_after: NDArray[np.float64]
    magnitude_difference: NDArray[np.float64]
    one_minus_cosine: NDArray[np.float64]
    update_square: NDArray[np.float64]
    radial_update: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.magnitude_before)

    def arrays(self) -> list[NDArray[np.float64]]:
        """All arrays in their order."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def has_direction(self) -> NDArray[np.bool_]:
        """Which units have a direction both before and after."""
        directed: NDArray[np.bool_] = has_direction(self.one_minus_cosine, self.is_finite)
        return directed

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        """Which units hold neither NaN nor Inf, before and after."""
        return np.isfinite(self.magnitude_before) & np.isfinite(self.magnitude_after)


@dataclass(frozen=True)
class WeightChange(Measures):
    """How one weight changed: the fields of `Measures`, with the per-unit arrays in `units`.

    A unit that holds NaN or Inf makes every reduced measure NaN and is counted in `non_finite`:
    such weights are reported, never averaged away. A unit of zero norm has a magnitude but no
    direction: it enters ΔM, is left out of ΔD and of the relative measure, and is counted in
    `zero_units`; so does one of whose norm less than a billionth is left, but for the relative
    measure. A float64 unit whose squared norm is beyond float64 counts as not finite (norms
    above 1e154) or as zero (below 1e-162).

    Attributes:
        axis: "output" (one unit per output feature) or "input".
        units: the per-unit arrays.
    """

    axis: Axis
    units: UnitChange


def magnitude(weight: Tensor, axis: Axis = "output") -> NDArray[np.float64]:
    """The magnitude m = ‖W‖_c of each unit (Eq. 2), in float64.

    Args:
        weight: shape (out, in); fp64, fp32, bf16 or fp16.
        axis: "output" for one magnitude per row, "input" for one per column.

    Returns:
        Shape (out,) or (in,).

    Raises:
        TypeError: `weight` is not a floating-point tensor.
        InputError: `weight` is not a non-empty matrix, or the axis is unknown.
    """
    rows = _units_first(weight, axis, "weight")
    norms: NDArray[np.float64] = torch.linalg.vector_norm(
        rows.detach().to(torch.float64), dim=1
    ).numpy(force=True)
    return norms


def direction(weight: Tensor, axis: Axis = "output") -> Tensor:
    """The direction V/‖V‖_c of each unit (Eq. 2): unit vectors, in float64.

    Args:
        weight: shape (out, in); fp64, fp32, bf16 or fp16.
        axis: "output" to normalise each row, "input" to normalise each column.

    Returns:
        The shape of `weight`. A unit of zero norm has no direction: NaN.

    Raises:
        TypeError: `weight` is not a floating-point tensor.
        InputError: `weight` is not a non-empty matrix, or the axis is unknown.
    """
    rows = _units_first(weight, axis, "weight").detach().to(torch.float64)
    unit_vectors: Tensor = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return unit_vectors if axis == "output" else unit_vectors.T


def weight_change(before: Tensor, after: Tensor, axis: Axis = "output") -> WeightChange:
    """Split the change from `before` to `after` into magnitude and direction (Eq. 2 to 4).

    The differences of the stored values are accumulated, so that changes far below the rounding
    of the weights' norms are measured exactly; `1 − cosine_similarity` is noise there.

    Args:
        before: W_0, shape (out, in); fp64, fp32, bf16 or fp16, on any device.
        after: W', same shape, dtype and device.
        axis: "output" for one unit per row (the paper's choice), "input" for one per column.

    Returns:
        The reduced measures and, in `units`, the per-unit arrays.

    Raises:
        TypeError: a weight is not a floating-point tensor, or the dtypes differ.
        InputError: the shapes or devices differ, a weight is not a dense, non-empty matrix, or
            the axis is unknown.
    """
    rows_before = _units_first(before, axis, "before")
    rows_after = _units_first(after, axis, "after")
    if before.shape != after.shape:
        raise InputError(
            f"before has shape {tuple(before.shape)} but after has shape {tuple(after.shape)}: "
            "compare a weight with a later state of the same weight."
        )
    if before.dtype != after.dtype:
        raise TypeError(
            f"before is {before.dtype} but after is {after.dtype}: the rounding between them "
            "would be counted as change; bring both to the dtype they were stored in."
        )
    if before.device != after.device:
        raise InputError(
            f"before is on {before.device} but after is on {after.device}: move one of them."
        )
    with torch.no_grad():
        return reduce_units(unit_change(_kernels.dense_sums(rows_before, rows_after)), axis)


def low_rank_change(
    before: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    magnitude: Tensor | None = None,
    axis: Axis = "output",
) -> WeightChange:
    """The change made by a LoRA or DoRA adapter, from its factors alone (Eq. 1 and 5).

    Equal to `weight_change(W_0, W')` in exact arithmetic, but W' is built only for DoRA with
    `axis="input"`, where the two normalisations do not commute.

    Args:
        before: W_0, shape (out, in).
        A: shape (rank, in).
        B: shape (out, rank).
        scaling: the factor on B A: alpha / rank, or alpha / √rank with rsLoRA.
        magnitude: DoRA's m, shape (out,); None for LoRA. A negative entry turns its unit around; a
            unit that is zero before m scales it stays zero, as in `adapters.DoRA`.
        axis: "output" or "input", as in `weight_change`.

    Returns:
        As `weight_change`.

    Raises:
        TypeError: `before` is not a floating-point tensor.
        InputError: shapes do not fit together, or the axis is unknown.
    """
    _units_first(before, axis, "before")
    out_features, in_features = before.shape
    if (
        A.ndim != 2
        or B.ndim != 2
        or A.shape[1] != in_features
        or B.shape
        != (
            out_features,
            A.shape[0],
        )
    ):
        raise InputError(
            f"a weight of shape {tuple(before.shape)} needs A of shape (rank, {in_features}) and B "
            f"of shape ({out_features}, rank), not {tuple(A.shape)} and {tuple(B.shape)}."
        )
    if magnitude is not None and magnitude.shape != (out_features,):
        raise InputError(
            f"magnitude must have shape ({out_features},), not {tuple(magnitude.shape)}."
        )
    with torch.no_grad():
        update = _kernels.LowRankUpdate(before, A, B, scaling)
        if magnitude is None:
            sums = _kernels.low_rank_sums(update if axis == "output" else update.transposed)
            change = unit_change(sums, least_left=LEAST_LEFT_BY_FACTORS)
        elif axis == "output":
            change = _rescale(_kernels.low_rank_sums(update), magnitude.to(torch.float64))
        else:
            base = before.to(torch.float64)
            turned = base + scaling * (B.to(torch.float64) @ A.to(torch.float64))
            norms = torch.linalg.vector_norm(turned, dim=1, keepdim=True)
            norms = norms.masked_fill(norms == 0, 1.0)
            after = turned * (magnitude.to(torch.float64).unsqueeze(1) / norms)
            change = unit_change(_kernels.dense_sums(base.T, after.T))
        return reduce_units(change, axis)


def unit_change(sums: _kernels.UnitSums, *, least_left: float = LEAST_LEFT) -> UnitChange:
    """Per-unit magnitudes and directions from the four sums of a change."""
    return UnitChange(*unit_arrays(*_arrays(sums), least_left=least_left))


def _rescale(sums: _kernels.UnitSums, magnitude: Tensor) -> UnitChange:
    """DoRA (Eq. 5): the direction of the low-rank update, the magnitude |m|, the sign of m."""
    a, e, c, P = _arrays(sums)
    turned = unit_arrays(a, e, c, P, least_left=LEAST_LEFT_BY_FACTORS)
    return UnitChange(*rescaled(turned, P, magnitude.numpy(force=True)))


def _arrays(sums: _kernels.UnitSums) -> NDArray[np.float64]:
    table: NDArray[np.float64] = sums.table.numpy(force=True)
    return table


def reduce_units(units: UnitChange, axis: Axis) -> WeightChange:
    """Reduce per-unit changes to the measures of Eq. 3 and 4 and those beside them."""
    sums = np.array(terms(units.arrays())).sum(axis=1)
    numbers = measures(sums[:, np.newaxis], np.full(1, float(len(units))))
    return WeightChange(axis, units, **named(MEASURES, numbers[:, 0].tolist()))


def _units_first(weight: object, axis: Axis, name: str) -> Tensor:
    """A view of `weight` with one unit per row; raises on what has no units."""
    if axis not in AXES:
        raise InputError(f"axis must be 'output' or 'input', not {axis!r}.")
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(weight).__name__}.")
    if not weight.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be a floating-point tensor, not {weight.dtype}; dequantise it first."
        )
    if weight.layout != torch.strided or weight.is_meta:
        stored = "on the meta device" if weight.is_meta else f"stored as {weight.layout}"
        raise InputError(f"{name} is {stored}: give a dense tensor that holds its values.")
    if weight.ndim != 2:
        raise InputError(
            f"{name} must be a matrix of shape (out, in), not of shape {tuple(weight.shape)}; "
            "flatten a convolution's filters first."
        )
    if weight.numel() == 0:
        raise InputError(f"{name} is empty: its shape is {tuple(weight.shape)}.")
    weight = weight.resolve_neg()
    return weight if axis == "output" else weight.T
