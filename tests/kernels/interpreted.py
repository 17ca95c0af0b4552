"""The GPU kernels in Triton's interpreter, on the CPU; run by test_gpu_paths.

In a process alone, which starts with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from dora_dynamics._kernels import (
    LowRankUpdate,
    low_rank,
    triton_gather,
    triton_low_rank,
    triton_low_rank_plan,
    triton_path,
)
from dora_dynamics._kernels.sums import LARGEST, SMALLEST
from tests.kernels.cases import DTYPES, LAYOUTS, assert_sums, changed, difficult
from tests.kernels.test_gpu_paths import CANNOT_INTERPRET

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

cuda: Any = torch.cuda
cuda.device = contextlib.nullcontext


def count_calls(module: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a function of a module from now on."""
    function = getattr(module, name)
    calls: list[tuple[Any, ...]] = []

    def counting(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    setattr(module, name, counting)
    return calls


def dense() -> None:
    """Every layout, ragged shapes and difficult rows, all in one plan."""
    layouts = [name for name in LAYOUTS if name != "unaligned"]
    pairs = [
        (LAYOUTS[layout](before), LAYOUTS[layout](after))
        for dtype in DTYPES
        for layout in layouts
        for before, after in [changed((3, 300), dtype), changed((17, 37), dtype), difficult(dtype)]
    ]
    pairs += [changed((1, 17), torch.float32), changed((9, 3), torch.bfloat16)]
    for (before, after), found in zip(pairs, triton_path.queue(pairs)(), strict=True):
        assert_sums(found, before, after)


def counts() -> None:
    """A model of one dtype is one launch and one transfer, its table made once."""
    shapes = [(8, 32), (32, 8), (5, 16), (16, 16)]
    pairs = [changed(shape, torch.float32) for shape in shapes]
    aligned = [pair for pair in pairs if triton_path.layout_of(*pair).aligned]
    assert len(triton_path.plan_of(aligned).launches) == 1
    assert triton_path.plan_of(aligned) is triton_path.plan_of(aligned)
    transfers = count_calls(triton_path, "to_host")
    triton_path.queue(pairs)()
    assert len(transfers) == 1
    plan = triton_path.plan_of(pairs)
    assert plan.total == sum(units for units, _ in shapes)
    tables = sum(one.table.nbytes + one.owners.nbytes for one in plan.launches)
    assert tables < 1000 + 4 * plan.total


def gathered() -> None:
    """Factors one after the other, exactly in float64, and in parts that add up to float32."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.float64):
        factors = [
            (torch.randn(shape, generator=generator) * 10.0**power).to(dtype)
            for shape, power in (((3, 1000), 0), ((1, 5), 3), ((70, 30), -3))
        ]
        for some in (factors, [factors[0], factors[2].T, factors[1]]):
            what = triton_gather.gathering(some)
            exact = torch.zeros(what.size + 3, dtype=torch.float64)
            parts = torch.zeros((3, what.size + 5), dtype=torch.bfloat16)
            triton_gather.gather(what, exact, parts)
            expected = torch.cat([factor.reshape(-1) for factor in some])
            assert what.contiguous == (some is factors)
            assert torch.equal(exact, torch.nn.functional.pad(expected.double(), (0, 3)))
            assert torch.equal(parts.float().sum(0)[: what.size], expected.float())
            error = (parts[0, : what.size].double() - expected.double()).abs()
            assert bool((error <= 2**-7 * expected.double().abs()).all())
            assert not parts[:, what.size :].any()


def with_bfloat16_products() -> None:
    """Have the interpreter multiply bfloat16 by its value: it takes the bits for whole numbers."""
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def value(factor: Any) -> Any:
        if factor.data.dtype != np.uint16:
            return factor
        bits = factor.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return create_dot(self, value(a), value(b), *others)

    builder.create_dot = dot


@contextlib.contextmanager
def counted_reads(weights: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """How many elements of each weight are read meanwhile, those read twice counted twice."""
    counts = [0] * len(weights)
    builder = interpreter.InterpreterBuilder
    load = builder.create_masked_load

    def counting(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        read = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        for i, weight in enumerate(weights):
            first = weight.data_ptr()
            counts[i] += int(((read >= first) & (read < first + weight.nbytes)).sum())
        return load(self, ptrs, mask, *others)

    with mock.patch.object(builder, "create_masked_load", counting):
        yield counts


def read_once() -> None:
    """Every element of every weight, in whole tiles and others, and none of them again."""
    generator = torch.Generator().manual_seed(0)
    pairs, updates = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("rows", "columns"):
            for shape in ((19, 300), (8, 256)):
                before, after = (LAYOUTS[layout](w) for w in changed(shape, dtype))
                pairs.append((before, after))
                A = torch.randn(8, shape[1], generator=generator) / 8
                B = torch.randn(shape[0], 8, generator=generator) * 1e-3
                updates.append(LowRankUpdate(before, A, B, 2.0))
    weights = [weight for pair in pairs for weight in pair]
    with counted_reads(weights) as counts:
        triton_path.queue(pairs)()
    assert counts == [weight.numel() for weight in weights]
    with counted_reads(weights) as counts:
        triton_low_rank.queue(updates)
    assert counts[::2] == [update.before.numel() for update in updates]
    assert not any(counts[1::2])


def assert_low_rank(sums: torch.Tensor, update: LowRankUpdate) -> None:
    """The sums of an update that is no trouble, shape (4, units), beside those in float64."""
    reference = low_rank.plain_sums(update)
    a, e, c, P = sums
    scale = (reference.before_square * reference.update_square).sqrt()
    assert bool(((a / reference.before_square - 1).abs() < 1e-6).all())
    assert bool(((e - reference.dot).abs() < 1e-6 * scale).all())
    assert bool(((c / reference.update_square - 1).abs() < 1e-12).all())
    assert bool(((P / reference.tangential_square - 1).abs() < 1e-6).all())


def every_tiling() -> None:
    """e of the kernel itself, in tiles of each kind: more than one, the last ones not full."""
    generator = torch.Generator().manual_seed(0)
    updates = []
    for (is_split, padded), (rows, columns, *_) in triton_low_rank_plan.TILINGS.items():
        dtype = torch.bfloat16 if is_split else torch.float32
        for units, features, rank in (
            (rows + 3, columns + 5, padded * 2 // 3),
            (rows + 16, columns + 16, padded),
        ):
            w = changed((units, features), dtype)[0]
            A = torch.randn(rank, features, generator=generator) / 8
            B = torch.randn(units, rank, generator=generator) * 1e-3
            for layout in ("rows", "columns"):
                updates.append(LowRankUpdate(LAYOUTS[layout](w), A, B, 2.0))
    plans = [triton_low_rank_plan.make_plan([update]) for update in updates]
    kinds = [portion.kind for plan in plans for portion in plan.portions]
    assert len({(kind.is_split, kind.rank, kind.by_column) for kind in kinds}) == 16
    assert {portion.aligned for plan in plans for portion in plan.portions} == {False, True}
    with mock.patch.object(triton_low_rank, "sum_again"):  # which would hide a wrong e
        for update, plan in zip(updates, plans, strict=True):
            sums = torch.empty((4, plan.total), dtype=torch.float64)
            triton_low_rank.run(plan, sums)
            assert_low_rank(sums, update)


def low_rank_changes() -> None:
    """e and c of LoRA's factors, in both layouts."""
    generator = torch.Generator().manual_seed(0)
    updates = []
    for dtype in (torch.float32, torch.float16):
        for units, features, rank in ((70, 48, 4), (33, 150, 8), (66, 128, 16)):
            w = changed((units, features), dtype)[0]
            A = torch.randn(rank, features, generator=generator) / 8
            B = torch.randn(units, rank, generator=generator) * 1e-3
            updates.append(LowRankUpdate(w, A, B, 2.0))
            columns = LAYOUTS["columns"](w)
            updates.append(LowRankUpdate(columns, A.to(torch.bfloat16), B.T.T, 0.5))
    before = [(update.A.clone(), update.B.clone()) for update in updates]
    plan = triton_low_rank_plan.make_plan(updates, limit=150 * 8)
    assert len(plan.portions) > len({triton_low_rank_plan.kind_of(u) for u in updates})
    assert sum(sum(p.shapes.values()) for p in plan.portions) == len(updates)
    assert max(portion.A.size for portion in plan.portions) <= max(150 * 8, 128 * 16)
    sums, firsts = torch.empty((4, plan.total), dtype=torch.float64), plan.first_units
    launches = count_calls(triton_low_rank, "launch")
    triton_low_rank.run(plan, sums)
    assert len(launches) == len(plan.portions)
    assert torch.equal(triton_low_rank.queue(updates)[0][2].sort()[0], sums[2].sort()[0])
    kept = triton_low_rank_plan.plan_of(updates)
    assert triton_low_rank_plan.plan_of(list(updates)) is kept
    assert len(kept.portions) == len({triton_low_rank_plan.kind_of(u) for u in updates})
    assert triton_low_rank_plan.plan_of(updates[:3]) is not kept
    for update, (A, B) in zip(updates, before, strict=True):
        assert torch.equal(update.A, A)
        assert torch.equal(update.B, B)
    for update, first in zip(updates, firsts, strict=True):
        assert_low_rank(sums[:, first : first + len(update.before)], update)


def low_rank_changes_again() -> None:
    """What float32 is too little for: updates along the weights, and weights out of its range."""
    generator = torch.Generator().manual_seed(0)
    updates, along = [], []
    for dtype in (torch.float32, torch.float16):
        w = changed((35, 150), dtype)[0]
        A, B = torch.randn(4, 150, generator=generator), torch.randn(35, 4, generator=generator)
        some = B.clone()
        some[::3] = 0  # of these units d is a multiple of w_0, but for rounding in it
        radial = torch.cat([1e-3 * w.float(), A])
        scale = torch.zeros(35, 35)
        scale[torch.arange(0, 35, 3), torch.arange(0, 35, 3)] = 1.0
        along.append(LowRankUpdate(w, radial, torch.cat([scale, some], 1), 0.5))
        tiny = w * 1e-4 if dtype == torch.float16 else w * 1e-18
        updates.append(LowRankUpdate(tiny, A, B, 0.5))
        columns = LAYOUTS["columns"](tiny)
        updates.append(LowRankUpdate(columns, A.T.contiguous().T, B, 2.0))
    updates += along
    bad = changed((20, 70), torch.float32)[0]
    bad[3, 5], bad[4] = float("nan"), 0
    A, B = torch.randn(2, 70, generator=generator), torch.randn(20, 2, generator=generator)
    updates.append(LowRankUpdate(bad, A, B, 1.0))
    sums, firsts = triton_low_rank.queue(updates)
    found_again = 0
    for update, first in zip(updates, firsts, strict=True):
        reference = low_rank.plain_sums(update)
        a, e, c, P = sums[:, first : first + len(update.before)]
        close: dict[str, Any] = {"atol": 0.0, "equal_nan": True}
        torch.testing.assert_close(a, reference.before_square, rtol=1e-6, **close)
        torch.testing.assert_close(c, reference.update_square, rtol=1e-12, **close)
        assert bool(
            ((e - reference.dot).abs().nan_to_num() <= 1e-6 * (a * c).sqrt().nan_to_num()).all()
        )
        again = ~((a >= SMALLEST) & (a <= LARGEST) | (a == 0))
        again |= ~(reference.tangential_square >= 0.4 * c)
        found_again += int(again.sum())
        torch.testing.assert_close(e[again], reference.dot[again], rtol=1e-11, **close)
        P_again = reference.tangential_square[again]
        noise = 1e-13 * c[again].nan_to_num(1.0)
        assert bool((((P[again] - P_again).abs() <= noise) | P_again.isnan()).all())
        assert torch.equal(P[again].isnan(), P_again.isnan())
    assert found_again >= 2 * 35 + 2 * 12 + 1, found_again


def _add_one(numbers: tl.tensor, count: tl.tensor) -> None:
    for i in tl.range(0, count, 1):
        tl.store(numbers + i, tl.load(numbers + i) + 1.0)


def can_interpret() -> bool:
    """Whether this Triton runs with this numpy: some do not."""
    numbers = torch.zeros(2)
    add_one: Any = triton.jit(_add_one)
    try:
        add_one[(1,)](numbers, len(numbers))
    except Exception:
        return False
    return numbers.tolist() == [1.0, 1.0]


if __name__ == "__main__":
    if not can_interpret():
        sys.exit(CANNOT_INTERPRET)
    dense()
    counts()
    gathered()
    with_bfloat16_products()
    every_tiling()
    read_once()
    low_rank_changes()
    low_rank_changes_again()
