"""The checkpoints that are chosen of a run."""

from __future__ import annotations

import pandas as pd
import pytest

from dora_dynamics.statistics import select_checkpoints


def chosen_steps(steps: list[int], **options: object) -> list[int]:
    table = pd.DataFrame({"run": "a", "step": steps})
    return select_checkpoints(table, **options)["step"].tolist()  # type: ignore[arg-type]


def test_checkpoints_are_spread_over_the_asked_part_of_the_run() -> None:
    steps = list(range(0, 1001, 25))
    assert chosen_steps(steps) == [625, 750, 875, 1000]
    assert chosen_steps(steps, kind="even") == [250, 500, 750, 1000]
    assert chosen_steps(steps, kind="early") == [125, 250, 375, 500]
    assert chosen_steps(steps, count=1) == [1000]


def test_checkpoints_are_never_step_zero_nor_taken_twice() -> None:
    assert chosen_steps([0, 1, 100], kind="early") == [1, 100]
    assert chosen_steps([0, 10, 900, 950, 1000]) == [10, 900, 950, 1000]
    assert chosen_steps([0, 990, 1000], count=2) == [990, 1000]
    assert chosen_steps([0]) == []


def test_checkpoints_are_chosen_per_run_and_keep_all_rows_in_order() -> None:
    table = pd.DataFrame(
        {
            "run": [*"aaaa", *"bbbb"],
            "step": [100, 100, 50, 20, 8, 4, 8, 2],
            "site": list("pqpqpqpq"),
        }
    )
    kept = select_checkpoints(table, count=1)
    pd.testing.assert_frame_equal(kept, table.loc[[0, 1, 4, 6]])


def test_checkpoints_refuse_wrong_input() -> None:
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        chosen_steps([1, 2], count=0)
    with pytest.raises(ValueError, match="kind must be one of late, even, early; got 'mid'"):
        chosen_steps([1, 2], kind="mid")
    with pytest.raises(ValueError, match="lacks what is needed here: run"):
        select_checkpoints(pd.DataFrame({"step": [1]}))
