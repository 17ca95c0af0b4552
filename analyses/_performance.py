"""The ways that `analyses.performance` times, and how it times them."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from dora_dynamics._kernels import (
    LowRankUpdate,
    blocks,
    dense_sums_of_all,
    dispatch,
    low_rank,
    threads,
)
from dora_dynamics._kernels.sums import UnitSums, exact_tensors
from dora_dynamics.decomposition import reduce_units, unit_change

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    Pairs = list[tuple[Tensor, Tensor]]

SEED: Final = 0
SHORTEST, LONGEST = 1 << 26, 1 << 33
"""Cycles that a GPU is kept busy while work is queued: from some 40 ms to 5 s."""
_MEMCMP: Any = ctypes.CDLL(None).memcmp
_MEMCMP.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Case:
    """Weights to measure, and where they are.

    Attributes:
        name: as in the table.
        shapes: of its matrices, (units, features).
        dtype: of the weights.
        sets: copies to take in turns, so that the data come from memory and not from a cache.
        rank: of the adapters, 0 for a dense change.
        transposed: whether units lie as columns in memory, as in a Conv1D.
    """

    name: str
    shapes: list[tuple[int, int]]
    dtype: torch.dtype
    sets: int = 1
    rank: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Way:
    """One way to measure a case.

    Attributes:
        run: does it, once for each of `repeats` sets.
        repeats: how many.
        result: its sums of the first matrix, to be held against float64; None for the naive ways.
        wall: whether wall time is meant on a GPU too, to the last number in host memory.
        uncaptured: where `run` replays a graph, which holds its memory all the time, what is in it.
    """

    run: Callable[[], object]
    repeats: int = 1
    result: UnitSums | None = None
    wall: bool = False
    uncaptured: Callable[[], object] | None = None


def weights(case: Case, device: str) -> list[Pairs]:
    """Random weights with random changes of 1%, in as many copies as the case asks for."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype) * 0.02

    first: Pairs = []
    for units, features in case.shapes:
        shape = (features, units) if case.transposed else (units, features)
        w = normal(shape)
        v = w if case.rank else w + 0.01 * normal(shape)
        first.append((w.T, v.T) if case.transposed else (w, v))
    return [first] + [[(w.clone(), v.clone()) for w, v in first] for _ in range(case.sets - 1)]


def adapters(case: Case, pairs: Pairs) -> list[LowRankUpdate]:
    """A low-rank update of each weight, of 1% or so, with factors in float32."""
    generator = torch.Generator(pairs[0][0].device).manual_seed(SEED + 1)
    found = []
    for w, _ in pairs:
        A = torch.randn(case.rank, w.shape[1], generator=generator, device=w.device)
        B = torch.randn(w.shape[0], case.rank, generator=generator, device=w.device)
        found.append(LowRankUpdate(w, A / case.rank**0.5, B * 2e-4, 1.0))
    return found


def naive(pairs: Pairs, dtype: torch.dtype | None = None) -> Tensor:
    """ΔM and ΔD as they are usually computed, summed over the matrices."""
    found = []
    for before, after in pairs:
        w, v = (before, after) if dtype is None else (before.to(dtype), after.to(dtype))
        magnitude = (v.norm(dim=1) - w.norm(dim=1)).abs().mean()
        found.append(magnitude + (1 - cosine_similarity(w, v, dim=1)).mean())
    return torch.stack(found).sum()


def built(update: LowRankUpdate, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W_0 and W' = W_0 + s B A, both in `dtype`."""
    w = update.before.to(dtype)
    return w, w + update.scaling * (update.B.to(dtype) @ update.A.to(dtype))


def exact(case: Case, pairs: Pairs) -> UnitSums:
    """The sums of the first matrix in float64."""
    if case.rank:
        return low_rank.plain_sums(adapters(case, pairs[:1])[0])
    return exact_tensors(*pairs[0])


def cpu_ways(case: Case, sets: list[Pairs]) -> dict[str, Way]:
    """The ways to measure a case on the CPU; "read" is the limit."""
    if case.rank:
        updates = adapters(case, sets[0])
        result = low_rank.low_rank_sums_of_all(updates[:1])[0]
        return {
            "naive": Way(lambda: [naive([built(u, torch.float32)]) for u in updates]),
            "naive, float64": Way(lambda: [naive([built(u, torch.float64)]) for u in updates]),
            "low rank": Way(lambda: low_rank.low_rank_sums_of_all(updates), result=result),
        }
    elements = sum(units * features for units, features in case.shapes)
    repeats = max(case.sets, min(50, (1 << 23) // elements))

    def each(function: Callable[[Pairs], object]) -> Callable[[], object]:
        return lambda: [function(sets[i % len(sets)]) for i in range(repeats)]

    ways = {
        "naive": Way(each(naive), repeats),
        "naive, float64": Way(each(partial(naive, dtype=torch.float64)), repeats),
        "read": Way(each(read), repeats),
    }
    for name, path in cpu_paths().items():
        sums = partial(dispatch.cpu_sums, path=path)
        ways[name] = Way(each(sums), repeats, sums(sets[0][:1])[0])
    return ways


def cpu_paths() -> dict[str, Any]:
    """The paths that this installation has, by the name the table gives them."""
    best = dispatch.cpu_path()
    return {"numpy blocks": blocks} | ({} if best is blocks else {"numba": best})


def read(pairs: Pairs) -> None:
    """Read both weights of every pair once: memcmp of each piece with itself, over all threads."""
    step = 1 << 20
    pieces = [
        (weight.data_ptr() + start, min(step, weight.nbytes - start))
        for pair in pairs
        for weight in pair
        for start in range(0, weight.nbytes, step)
    ]
    tasks = [partial(_MEMCMP, address, address, size) for address, size in pieces]
    threads.run_all(tasks, worth_threads=len(tasks) > 4)


def gpu_ways(case: Case, sets: list[Pairs]) -> dict[str, Way]:
    """The ways to measure a case on an NVIDIA or AMD GPU; "copy" is the limit."""
    from dora_dynamics._kernels import triton_low_rank, triton_low_rank_plan, triton_path

    device = sets[0][0][0].device
    source = torch.ones(1 << 29, device=device)
    target = torch.empty_like(source)
    ways = {"copy": Way(lambda: target.copy_(source))}

    def launch(pairs: Pairs) -> Tensor:
        plan = triton_path.make_plan(pairs)
        found = torch.empty((4, plan.total), dtype=torch.float64, device=device)
        triton_path.run(plan, found)
        return found

    if case.rank:
        updates = adapters(case, sets[0])
        plan = triton_low_rank_plan.plan_of(updates)
        low_rank_sums = torch.empty((4, plan.total), dtype=torch.float64, device=device)
        result = UnitSums(triton_low_rank.queue(updates[:1])[0])

        def low_rank_run() -> None:
            triton_low_rank.run(plan, low_rank_sums)

        return ways | {
            "naive": Way(lambda: [naive([built(u, torch.float32)]) for u in updates]),
            "naive, float64": Way(lambda: [naive([built(u, torch.float64)]) for u in updates]),
            "built, then triton": Way(lambda: [launch([built(u, torch.float32)]) for u in updates]),
            "low rank": Way(captured(low_rank_run), 1, result, uncaptured=low_rank_run),
            "low rank, to host": Way(lambda: low_rank.low_rank_sums_of_all(updates), wall=True),
        }
    plans = [triton_path.make_plan(pairs) for pairs in sets]
    sums = torch.empty((4, plans[0].total), dtype=torch.float64, device=device)
    result = dense_sums_of_all(sets[0][:1])[0]

    def all_sets() -> None:
        for plan in plans:
            triton_path.run(plan, sums)

    def each(function: Callable[[Pairs], object]) -> Callable[[], object]:
        return lambda: [function(pairs) for pairs in sets]

    return ways | {
        "naive": Way(each(naive), len(sets)),
        "naive, float64": Way(each(partial(naive, dtype=torch.float64)), len(sets)),
        "triton": Way(captured(all_sets), len(sets), result),
        "triton, to host": Way(each(dense_sums_of_all), len(sets), wall=True),
    }


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """The same device work, replayed as a CUDA graph: no gaps between its launches."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(_kept_alive: Callable[[], object] = work) -> None:
        graph.replay()

    return replay


def in_turns(ways: dict[str, Way], rounds: int, device: str) -> dict[str, NDArray[np.float64]]:
    """Seconds of each way, once a round, one way after the other."""
    for way in ways.values():
        way.run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            time_one = by_wall if device == "cpu" or way.wall else by_events
            seconds[name].append(time_one(way.run) / way.repeats)
    return {name: np.array(values) for name, values in seconds.items()}


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of so many ways that favour none: a balanced Latin square (Williams, 1949).

    Over all of them each way stands equally often in each position, and equally often right after
    each other way, which may leave the machine warm or its memory in pieces.
    """
    first = [(i + 1) // 2 if i % 2 else (count - i // 2) % count for i in range(count)]
    orders = [[(way + shift) % count for way in first] for shift in range(count)]
    return orders + [order[::-1] for order in orders] if count % 2 else orders


def by_wall(work: Callable[[], object]) -> float:
    """Seconds until `work` and all that it queued on a GPU is done."""
    wait_for_gpu()
    start = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu() -> None:
    """Wait until a GPU, if there is one, has done all that is queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def by_events(work: Callable[[], object]) -> float:
    """Seconds that a GPU takes from the beginning to the end of `work`."""
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def when_queued(work: Callable[[], object]) -> float:
    """Seconds that a GPU takes for `work`, which waits for nothing, once all of it is queued.

    Raises:
        RuntimeError: it waits for the GPU, however long that is busy.
    """
    cuda: Any = torch.cuda
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cycles = SHORTEST
    while cycles <= LONGEST:
        wait_for_gpu()
        cuda._sleep(cycles)
        start.record()
        held = work()
        end.record()
        was_behind = not start.query()
        end.synchronize()
        del held
        if was_behind:
            return 1e-3 * float(start.elapsed_time(end))
        cycles *= 2
    raise RuntimeError("this work waits for the GPU, and cannot be timed behind other work.")


def extra_memory(work: Callable[[], object]) -> float:
    """Bytes a GPU holds at most during `work`, above what it held before."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


def relative_error(found: UnitSums, reference: UnitSums) -> float:
    """The larger of the relative errors of ΔM and ΔD."""
    one, other = (reduce_units(unit_change(sums), "output") for sums in (found, reference))
    return max(
        abs(one.delta_magnitude / other.delta_magnitude - 1),
        abs(one.delta_direction / other.delta_direction - 1),
    )
