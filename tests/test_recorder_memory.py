"""What one record allocates for its moment: bytes, never seconds.

Recording a trained weight may allocate for each unit, never for each element; recording a low-rank
change, for the factors, the units and one block of the weight, however many weights there are.
"""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics._kernels.threads import at_most

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11

UNIT = 600
"""Bytes a unit may take: its sums, its changes, and the numbers that a row says of them."""
FIXED = 1 << 17
BLOCK = 4 << 22
"""Bytes of the block of a weight, in fp32, that a low-rank change is measured by on the CPU."""
RANK = 4


def recorder_of(
    method: str, count: int, units: int, features: int, dtype: torch.dtype, device: str = "cpu"
) -> dd.Recorder:
    """A recorder that has recorded twice, of weights that have changed."""
    torch.manual_seed(0)
    layers = [nn.Linear(features, units, bias=False, dtype=dtype) for _ in range(count)]
    model = nn.Sequential(*layers).to(device)
    if method != "FT":
        apply: Callable[..., Any] = {"LoRA": dd.apply_lora, "DoRA": dd.apply_dora}[method]
        apply(model, ["*"], rank=RANK, alpha=RANK)
    recorder = dd.Recorder(model, ["*"], every=1)
    recorder.record()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    record_again(recorder)
    return recorder


def record_again(recorder: dd.Recorder) -> None:
    """Record the next step to its rows."""
    recorder.advance_to(recorder.step + 1)
    recorder.state_dict()


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python, numpy and torch's CPU allocator hold at most above what they held."""
    tracemalloc.start()
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            with at_most(1):
                work()
            in_python = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    found: Any = profiler.profiler
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    live = in_torch = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        in_torch = max(in_torch, live)
    return in_python + in_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "features"), [(1, 1024), (4, 1024), (2, 4096)])
def test_a_trained_weight_is_not_copied(count: int, features: int, dtype: torch.dtype) -> None:
    recorder = recorder_of("FT", count, 509, features, dtype)
    used = peak(lambda: record_again(recorder))
    assert used < FIXED + UNIT * count * 509


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_a_low_rank_change_takes_one_block_at_a_time(method: str) -> None:
    """As much for four weights as for one but for units and factors; less than W' in fp32."""
    units, features = 4079, 2560
    found = {}
    for count in (1, 4):
        recorder = recorder_of(method, count, units, features, torch.bfloat16)
        found[count] = peak(lambda of=recorder: record_again(of))  # type: ignore[misc]
        mine = UNIT * units + 4 * RANK * (units + features)
        assert found[count] < FIXED + BLOCK + count * mine
        assert found[count] < 4 * units * features
    assert found[4] - found[1] < FIXED + 3 * (UNIT * units + 4 * RANK * (units + features))


def test_the_counters_see_a_copy() -> None:
    weight = torch.zeros(509, 1024)
    assert peak(weight.clone) >= weight.nbytes
    assert peak(lambda: weight.numpy().copy()) >= weight.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_trained_weight_is_not_copied_on_a_gpu() -> None:
    recorder = recorder_of("FT", 2, 509, 8192, torch.float32, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    record_again(recorder)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4 * 509 * 8192 // 4
