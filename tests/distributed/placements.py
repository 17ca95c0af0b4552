"""Weights of every kind, in every placement, against the same weights whole: exact sums."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from dora_dynamics.decomposition import AXES, UnitChange
from dora_dynamics.effective import Dense, LowRank
from dora_dynamics.measurement import measure_all
from dora_dynamics.sharded import Adapted
from dora_dynamics.sites import Site

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "matrix": [(5, 7), (1, 6), (8, 4099)],
    "transposed": [(5, 3)],
    "experts": [(3, 4, 5)],
    "filters": [(5, 3, 2, 2)],
    "vector": [(7,), (1,)],
    "parts": [(9, 4)],
    "heads": [(8, 3)],
}
THOROUGH = [(5, 7), (7,)]
"""Shapes that every kind of change is tried on; the others only the first three."""
ROUNDING = 1e-9
"""Low-rank sums have P = c − e²/a in float64: a unit of one feature turns by rounding errors."""
CHANGES = ["some", "radial", "half", "shrunk", "turned", "none", "zero rows", "nan"]


def meshes(device: str) -> list[DeviceMesh]:
    """One dimension, and two as FSDP with tensor parallelism has them."""
    world = dist.get_world_size()
    rows = 2 if world % 2 == 0 else 1
    return [init_device_mesh(device, (world,)), init_device_mesh(device, (rows, world // rows))]


def placements_of(mesh: DeviceMesh, dimensions: int) -> Iterator[tuple[Any, ...]]:
    """Every combination of sharded dimensions and copies."""
    one = [Replicate(), *(Shard(dim) for dim in range(min(dimensions, 3)))]
    return itertools.product(one, repeat=mesh.ndim)


def some(things: Iterable[T], turn: int, count: int = 2) -> list[T]:
    """A few of them, others in every turn: each comes with each of the rest at some point."""
    listed = list(things)
    return [listed[(turn * 5 + i * 2) % len(listed)] for i in range(min(count, len(listed)))]


def sites_of(name: str, kind: str, shape: tuple[int, ...]) -> list[Site]:
    """Sites as a model of that kind of weight has them."""
    if kind == "transposed":
        return [Site(name, 0, "", "query", stored_transposed=True)]
    if kind == "experts":
        return [Site(f"{name}[{i}]", 0, "", "up", expert=i) for i in range(shape[0])]
    if kind in ("filters", "vector"):
        return [Site(name, 0, "", "norm", kind=kind)]  # type: ignore[arg-type]
    if kind == "parts":
        rows = {"query": ((0, 3),), "key": ((3, 4), (8, 9)), "value": ((4, 8),)}
        return [Site(f"{name}[{part}]", 0, "", part, rows=rows[part]) for part in rows]
    if kind == "heads":
        return [Site(name, 0, "", "query", rows=((i, i + 2),), head=i // 2) for i in range(0, 8, 2)]
    return [Site(name, 0, "", "query")]


def changed(weight: Tensor, how: str, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """W_0 and W' in double precision, but for "half"."""
    step = torch.randn(weight.shape, generator=source, dtype=weight.dtype)
    if how == "radial":  # P is 1e-10 of the squared update: c − e²/a would be off by 1e-6
        return weight, weight * (1 - 1e-2) + 1e-7 * step
    if how == "shrunk":
        return weight, weight * 0.9 + 1e-3 * step
    if how == "turned":
        return weight, -0.5 * weight
    if how == "none":
        return weight, weight.clone()
    if how == "zero rows":
        before, after = weight.clone(), weight + 0.1 * step
        before[0], after[-1] = 0.0, 0.0
        return before, after
    if how == "nan":
        after = weight + 0.1 * step
        after[0] = float("nan")
        return weight, after
    if how == "half":
        return weight.to(torch.bfloat16), (weight + 0.1 * step).to(torch.bfloat16)
    return weight, weight + 1e-3 * step


def differences(found: list[Any], expected: list[Any], smallest: float = 1e-300) -> float:
    """The largest relative difference of any per-unit value; NaN must be where NaN is."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        for field in fields(UnitChange):
            a, b = (np.asarray(getattr(c.units, field.name)) for c in (one, other))
            assert np.array_equal(np.isnan(a), np.isnan(b)), field.name
            scale = np.maximum(np.abs(b), smallest)
            if field.name in ("radial_update", "magnitude_difference"):  # of either sign
                scale = np.fmax(scale, 0.1 * np.sqrt(other.units.update_square))
            worst = max(worst, float(np.nan_to_num(np.abs(a - b) / scale).max(initial=0.0)))
    return worst


def dense_weights(device: str) -> float:
    """All dense cases in one record: one all-reduce, and one more for the almost radial ones."""
    source = torch.Generator().manual_seed(0)
    whole: list[Any] = []
    sharded: list[Any] = []
    for mesh, (kind, shapes) in itertools.product(meshes(device), SHAPES.items()):
        for shape, how in itertools.product(shapes, CHANGES):
            if CHANGES.index(how) > 2 and shape not in THOROUGH:
                continue
            weight = torch.randn(shape, generator=source, dtype=torch.float64)
            pair = [w.to(device) for w in changed(weight, how, source)]
            for placements in some(placements_of(mesh, len(shape)), len(whole)):
                before, after = (distribute_tensor(w, mesh, placements) for w in pair)
                for site in sites_of(f"w{len(whole)}", kind, shape):
                    whole.append((site, pair[0], Dense(pair[1])))
                    sharded.append((site, before, Dense(after)))
    worst = 0.0
    for axis in AXES:
        with CommDebugMode() as traffic:
            found = measure_all(sharded, axis)
        fewest = 2 if dist.get_world_size() > 1 else 1  # alone, hardly a unit is split
        assert fewest <= traffic.get_total_counts() <= 2, traffic.get_comm_counts()
        worst = max(worst, differences(found, measure_all(whole, axis)))
    return worst


def low_rank_weights(device: str) -> float:
    """LoRA and DoRA: factors sharded, copied or not distributed, W_0 below or beside them."""
    source = torch.Generator().manual_seed(1)
    whole: list[Any] = []
    sharded: list[Any] = []
    for mesh, transposed in itertools.product(meshes(device), (False, True)):
        for with_m, shape in itertools.product((False, True), [(5, 7), (1, 6), (6, 33)]):
            units, features = shape
            weight, A, B, m, base = (
                torch.randn(size, generator=source, dtype=torch.float32).to(device)
                for size in (shape, (3, features), (units, 3), (units,), shape)
            )
            if transposed:
                weight, base = weight.T.contiguous(), base.T.contiguous()
            factors = LowRank(A, B, 0.25, m if with_m else None)
            turned = (base.T if transposed else base).double() + 0.25 * B.double() @ A.double()
            if with_m:
                turned *= (m / torch.linalg.vector_norm(turned, dim=1)).unsqueeze(1)
            other = turned.T if transposed else turned
            for placements in some(placements_of(mesh, 2), len(whole) // 2):
                kinds = [
                    tuple(Shard(0) if isinstance(p, Shard) else p for p in placements),
                    (Replicate(),) * mesh.ndim,
                    None,
                ]
                below, beside = (distribute_tensor(w, mesh, placements) for w in (weight, base))
                for kind in some(kinds, len(whole) // 2, count=1):
                    parts = [
                        t if kind is None else distribute_tensor(t, mesh, kind) for t in (A, B, m)
                    ]
                    own = LowRank(parts[0], parts[1], 0.25, parts[2] if with_m else None)
                    site, twin = (
                        Site(f"w{len(whole)}{x}", 0, "", "query", stored_transposed=transposed)
                        for x in "ab"
                    )
                    whole += [(site, weight, factors), (twin, weight.double(), Dense(other))]
                    sharded += [(site, below, own), (twin, below, Adapted(beside, own))]
    worst = 0.0
    for axis in AXES:
        with CommDebugMode() as traffic:
            found = measure_all(sharded, axis)
        assert traffic.get_total_counts() <= 4, traffic.get_comm_counts()
        worst = max(worst, differences(found, measure_all(whole, axis), ROUNDING))
    return worst
