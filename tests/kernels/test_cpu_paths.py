from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dora_dynamics._kernels import blocks, dispatch, threads
from dora_dynamics._kernels.sums import UnitSums, exact_tensors
from dora_dynamics.decomposition import reduce_units, unit_change
from tests.kernels.cases import DTYPES, LAYOUTS, SHAPES, assert_sums, changed, difficult

if TYPE_CHECKING:
    from torch import Tensor

PATHS = ["blocks", "numba_path"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Any:
    if request.param == "blocks":
        return blocks
    pytest.importorskip("numba")
    from dora_dynamics._kernels import numba_path

    return numba_path


def sums(path: Any, before: Tensor, after: Tensor) -> UnitSums:
    return dispatch.cpu_sums([(before, after)], path)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_and_ragged_shape(
    path: Any, dtype: torch.dtype, layout: str, shape: tuple[int, int]
) -> None:
    before, after = (LAYOUTS[layout](weight) for weight in changed(shape, dtype))
    assert_sums(sums(path, before, after), before, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "unaligned"])
def test_difficult_rows(path: Any, dtype: torch.dtype, layout: str) -> None:
    before, after = (LAYOUTS[layout](weight) for weight in difficult(dtype))
    assert_sums(sums(path, before, after), before, after)


def test_layouts_of_the_two_may_differ(path: Any) -> None:
    before, after = changed((40, 30), torch.float32)
    after = after.T.contiguous().T
    assert_sums(sums(path, before, after), before, after)


def test_a_row_longer_than_a_block(path: Any) -> None:
    before, after = changed((2, 300_001), torch.bfloat16)
    assert_sums(sums(path, before, after), before, after)


@pytest.mark.parametrize("columns", [6, 7, 9000, 300_000])
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_bfloat16_at_any_half_of_a_word(path: Any, columns: int, offsets: tuple[int, int]) -> None:
    pair = changed((3, columns), torch.bfloat16)
    shifted = []
    for weight, offset in zip(pair, offsets, strict=True):
        room = torch.zeros(weight.numel() + offset, dtype=torch.bfloat16)
        room[offset:] = weight.flatten()
        shifted.append(room[offset:].view(weight.shape))
        assert shifted[-1].data_ptr() % 4 == 2 * offset
    assert_sums(sums(path, *shifted), *pair)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-6])
def test_precision_of_the_contract(
    path: Any, dtype: torch.dtype, relative: float, layout: str
) -> None:
    before, after = (LAYOUTS[layout](w) for w in changed((4096, 1024), dtype, relative))
    assert error(sums(path, before, after), before, after) < 1e-6


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision_of_an_almost_radial_change(path: Any, dtype: torch.dtype, layout: str) -> None:
    before, noise = changed((4096, 1024), torch.float64, 1.0)
    after = before * 1.01 + 1e-5 * (noise - before)
    before, after = (LAYOUTS[layout](w.to(dtype)) for w in (before, after))
    assert error(sums(path, before, after), before, after) < 1e-6


def test_no_bias() -> None:
    """Rounding errors of the units have mean zero: they shrink when averaged."""
    before, after = changed((4096, 1024), torch.float32, 1e-3)
    reference = exact_tensors(before, after)
    for name in PATHS:
        if name == "numba_path":
            pytest.importorskip("numba")
        path = __import__(f"dora_dynamics._kernels.{name}", fromlist=["tasks"])
        found = sums(path, before, after)
        for one in ("before_square", "tangential_square"):
            relative = getattr(found, one) / getattr(reference, one) - 1
            assert abs(float(relative.mean())) < 5e-8


def test_torch_and_random_state_are_left_alone(path: Any) -> None:
    before, after = changed((600, 2000), torch.bfloat16)
    torch_threads, state = torch.get_num_threads(), torch.get_rng_state()
    versions = before._version, after._version
    sums(path, before, after)
    assert torch.get_num_threads() == torch_threads
    assert torch.equal(torch.get_rng_state(), state)
    assert (before._version, after._version) == versions


def test_from_several_threads_at_once(path: Any) -> None:
    before, after = changed((1200, 1000), torch.float32)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: sums(path, before, after), range(6)):
            assert_sums(found, before, after)


def test_many_at_once_are_in_order(path: Any) -> None:
    pairs = [changed((n, 64), torch.float32, seed=n) for n in (3, 1, 7)]
    for (before, after), found in zip(pairs, dispatch.cpu_sums(pairs, path), strict=True):
        assert_sums(found, before, after)


def test_a_failing_task_is_told() -> None:
    def fail() -> None:
        raise RuntimeError("told")

    with pytest.raises(RuntimeError, match="told"):
        threads.run_all([fail] * 8, worth_threads=True)


def test_at_most_so_many_threads_take_part() -> None:
    """Whatever torch is set to use, also in a copy of the context in another thread."""
    meeting = threading.Barrier(3)

    def meet() -> None:
        meeting.wait(30)

    with threads.at_most(3), ThreadPoolExecutor(1) as pool:
        together = partial(threads.run_all, [meet] * 3, worth_threads=True)
        pool.submit(copy_context().run, together).result()
    seen = set()
    with threads.at_most(1):
        threads.run_all([lambda: seen.add(threading.get_ident())] * 20, worth_threads=True)
    assert seen == {threading.get_ident()}


@pytest.mark.parametrize("shared", [False, True])
def test_memory_is_a_block_and_not_a_copy(shared: bool) -> None:
    """The buffers of a thread: a few blocks of float32, whatever the weight's size."""
    before, after = changed((8000, 1024), torch.bfloat16)
    tasks = blocks.tasks(before, after, torch.empty((4, len(before))).double().numpy(), shared)
    assert (len(tasks) > 1) == shared
    held: list[int] = []

    def work() -> None:
        for task in tasks:
            task()
        held.extend(room.nbytes for room, _ in blocks._local.__dict__.values())

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert 0 < sum(held) <= 2 * 4 * 1.1 * blocks.block_size(shared)
    assert before.numel() * 4 > 3 * sum(held)


def test_numpy_sees_large_blocks_where_threads_share_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counts, not seconds: one or two threads take blocks of the cache, more take large ones."""
    sizes: list[int] = []
    original = blocks._sum_block

    def counted(w: Any, d: Any, parts: Any) -> None:
        sizes.append(w.size)
        original(w, d, parts)

    monkeypatch.setattr(blocks, "_sum_block", counted)
    before, after = changed((4096, 1024), torch.float32)
    for workers, largest in ((1, 3 << 15), (2, 3 << 15), (3, 1 << 20)):
        sizes.clear()
        with threads.at_most(workers):
            sums(blocks, before, after)
        assert max(sizes) <= largest
        assert sum(sizes) == before.numel()
        assert len(sizes) == -(-before.numel() // largest)
    sizes.clear()
    with threads.at_most(3):
        sums(blocks, before[:384, :384], after[:384, :384])
    assert sizes == [192 * 384] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [384, 768])
def test_passes_over_a_small_matrix(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int
) -> None:
    """Counts, not seconds: what numpy is called for, on how many elements, into what memory."""
    before, after = changed((width, width), dtype)
    passes: dict[str, int] = {}
    calls: list[str] = []

    class Counting:
        add = np.add  # of sums alone

        def __getattr__(self, name: str) -> Any:
            found = getattr(np, name)
            if not isinstance(found, np.ufunc):
                return found

            def counted(*arguments: Any) -> Any:
                calls.append(name)
                passes[name] = passes.get(name, 0) + max(np.size(one) for one in arguments[:2])
                if name != "vecdot":  # a buffer begins where a line of the cache does
                    assert arguments[-1].ctypes.data % 64 == 0
                return found(*arguments)

            return counted

    monkeypatch.setattr(blocks, "np", Counting())
    assert_sums(sums(blocks, before, after), before, after)
    elements = before.numel()
    expected = {"subtract": elements, "vecdot": 3 * elements}
    if dtype == torch.bfloat16:  # two values in a word
        expected |= {"left_shift": elements, "bitwise_and": elements}
    assert passes == expected
    number = -(-elements // (3 << 15))
    assert len(calls) == number * (8 if dtype == torch.bfloat16 else 4)


def test_plans_of_small_weights_are_kept_and_of_no_other() -> None:
    """Views made once; never more than so many, and none of a buffer that is no longer used."""

    def work() -> None:
        kept = blocks._plans.__dict__
        for count in (200, 100):  # the first needs the larger buffer
            pair = changed((count, 96), torch.bfloat16)
            assert_sums(sums(blocks, *pair), *pair)
            first = dict(kept["made"])
            assert_sums(sums(blocks, *pair), *pair)
            assert all(kept["made"][key] is made for key, made in first.items())
        assert len(kept["made"]) == 2
        pair = changed((300, 98), torch.bfloat16)
        assert_sums(sums(blocks, *pair), *pair)
        assert len(kept["made"]) == 1
        for one in next(iter(kept["made"].values()))[1]:
            for name in ("w", "d"):
                assert np.shares_memory(getattr(one, name), blocks._local.__dict__[name][0])
        for count in range(1, blocks._KEPT_PLANS + 10):
            pair = changed((count, 10), torch.float32)
            assert_sums(sums(blocks, *pair), *pair)
            assert len(kept.get("made", ())) <= blocks._KEPT_PLANS
        large = torch.zeros(1100, 1000)
        sums(blocks, large, large)
        assert all(key[:2] != large.shape for key in kept.get("made", ()))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_core_works_without_extras() -> None:
    """With neither numba nor triton to import, the same numbers."""
    code = (
        "import sys; sys.modules['numba'] = sys.modules['triton'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('numba', 'triton') else real(n, *a)\n"
        "import torch, dora_dynamics as dd\n"
        "from dora_dynamics._kernels import dispatch\n"
        "change = dd.weight_change(torch.eye(3), 2 * torch.eye(3))\n"
        "assert change.delta_magnitude == 1, change\n"
        "assert dispatch.cpu_path().__name__.endswith('blocks')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_loads_no_extra() -> None:
    code = (
        "import sys, dora_dynamics, dora_dynamics.decomposition, dora_dynamics.recorder\n"
        "assert not {'numba', 'triton', 'llvmlite'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def error(found: UnitSums, before: Tensor, after: Tensor) -> float:
    one, other = (
        reduce_units(unit_change(s), "output") for s in (found, exact_tensors(before, after))
    )
    return max(
        abs(one.delta_magnitude / other.delta_magnitude - 1),
        abs(one.delta_direction / other.delta_direction - 1),
    )
