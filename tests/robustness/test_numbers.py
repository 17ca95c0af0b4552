"""What becomes of unusual weights, line by line of `dora_dynamics.trajectory`."""

from __future__ import annotations

import math
import re
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

MEASURES = ["delta_magnitude", "delta_direction", "update_norm"]


def model_of(weight: torch.Tensor | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"query": nn.Linear(7, 5), "value": nn.Linear(7, 3)})
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    if weight is not None:
        model["query"].weight = nn.Parameter(weight.clone())
    return model


def recorded(model: nn.Module, *events: Any, **options: Any) -> tuple[pd.DataFrame, list[str]]:
    """The table of a run in which each event happens in a step, and what was warned of."""
    recorder = dd.Recorder(model, ["query", "value"], every=1, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with recorder.attach(optimizer):
            for event in events:
                with torch.no_grad():
                    event()
                optimizer.step()
    return recorder.trajectory, [str(warning.message) for warning in caught]


def last(table: pd.DataFrame, site: str = "query") -> dict[str, Any]:
    row = table[table["site"] == site].iloc[-1]
    return {str(name): value for name, value in row.to_dict().items()}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_counted_and_never_averaged(bad: float) -> None:
    model = model_of()

    def spoil() -> None:
        model["query"].weight[1, 2] = bad
        model["query"].weight[4, 0] = bad

    table, said = recorded(model, lambda: model["value"].weight.mul_(1.5), spoil)
    row = last(table)
    assert row["non_finite"] == 2
    assert all(math.isnan(row[name]) for name in MEASURES)
    assert last(table, "value")["delta_magnitude"] > 0
    assert not said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exploding_weights_are_exact_up_to_the_largest_number(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    if dtype == torch.float64:
        largest = 1e150  # whose square is still a number
    model = model_of().to(dtype)
    before = model["query"].weight.detach().double().numpy().copy()
    table, _ = recorded(model, lambda: model["query"].weight.fill_(largest))
    row, after = last(table), np.full_like(before, float(torch.tensor(largest, dtype=dtype)))
    m, m0 = (np.sqrt((w / 1e3) ** 2 @ np.ones(7)) * 1e3 for w in (after, before))
    assert row["delta_magnitude"] == pytest.approx(np.abs(m - m0).mean(), rel=1e-6)
    cosine = (before * np.sign(after)).sum(1) / np.sqrt(7) / m0
    assert row["delta_direction"] == pytest.approx((1 - cosine).mean(), rel=1e-6)
    assert row["non_finite"] == 0


def test_fp16_overflow_is_non_finite() -> None:
    model = model_of().half()
    table, _ = recorded(model, lambda: model["query"].weight.mul_(60000).mul_(60000))
    assert last(table)["non_finite"] > 0
    assert math.isnan(last(table)["delta_magnitude"])


def test_zero_units_are_left_out_of_the_direction_and_counted() -> None:
    weight = torch.randn(5, 7, dtype=torch.float64)
    weight[1] = 0
    model = model_of(weight)
    after = weight + 0.1 * torch.randn(5, 7, dtype=torch.float64)
    after[3] = 0
    table, _ = recorded(model, lambda: model["query"].weight.copy_(after))
    row, some = last(table), [0, 2, 4]
    v, w = after.numpy(), weight.numpy()
    norms = np.linalg.norm(v, axis=1), np.linalg.norm(w, axis=1)
    cosine = (v * w).sum(1)[some] / norms[0][some] / norms[1][some]
    assert row["zero_units"] == 2
    assert row["delta_magnitude"] == pytest.approx(np.abs(norms[0] - norms[1]).mean())
    assert row["delta_direction"] == pytest.approx((1 - cosine).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", [1e-4, 1e-6, 1e-8, 1e-10, 1e-16, 1e-30])
def test_what_shrinks_a_billionfold_has_no_direction(left: float, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7, dtype=dtype)
    after = weight + 0.1 * torch.randn(5, 7, dtype=dtype)
    after[[1, 3]] = left * torch.randn(2, 7, dtype=dtype)
    model = model_of(weight)
    table, _ = recorded(model, lambda: model["query"].weight.copy_(after))
    row, kept = last(table), [0, 2, 4] if left < 1e-9 else [0, 1, 2, 3, 4]
    w, v = weight.double(), after.double()
    cosine = torch.cosine_similarity(w, v, dim=1, eps=0.0).numpy()
    assert row["zero_units"] == 5 - len(kept)
    assert row["delta_direction"] == pytest.approx((1 - cosine)[kept].mean(), rel=1e-6)
    change = dd.weight_change(weight, after)
    assert change.units.has_direction.nonzero()[0].tolist() == kept
    np.testing.assert_allclose(
        change.units.one_minus_cosine[kept], (1 - cosine)[kept], rtol=1e-5, atol=1e-9
    )
    assert row["delta_magnitude"] == pytest.approx(
        float((v.norm(dim=1) - w.norm(dim=1)).abs().mean())
    )


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("left", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12])
def test_what_factors_take_away_has_no_direction(left: float, method: str) -> None:
    """A unit that its low-rank update brings to a share of itself, in another direction."""
    W, A = torch.randn(5, 7, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    B = 0.1 * torch.randn(5, 2, dtype=torch.float64)
    A[0], B[2] = W[2], torch.tensor([-1.0, left])
    m = torch.rand(5, dtype=torch.float64) + 0.5 if method == "DoRA" else None
    change = dd.low_rank_change(W, A, B, scaling=1.0, magnitude=m)
    kept = [0, 1, 3, 4] if left < 1e-5 else [0, 1, 2, 3, 4]
    turned = W + B @ A
    turned[2] = left * A[1]
    cosine = torch.cosine_similarity(W, turned, dim=1, eps=0.0).numpy()
    assert change.zero_units == 5 - len(kept)
    assert change.delta_direction == pytest.approx((1 - cosine)[kept].mean(), rel=1e-5)
    after = turned if m is None else m[:, None] * turned / turned.norm(dim=1, keepdim=True)
    magnitudes = after.norm(dim=1) - W.norm(dim=1)
    assert change.delta_magnitude == pytest.approx(float(magnitudes.abs().mean()), rel=1e-6)


def test_weights_all_zero_have_no_direction() -> None:
    model = model_of(torch.zeros(5, 7))
    table, _ = recorded(model, lambda: model["query"].weight.add_(1))
    row = last(table)
    assert row["delta_magnitude"] == pytest.approx(math.sqrt(7))
    assert math.isnan(row["delta_direction"])
    assert row["zero_units"] == 5


def test_weights_that_stay_have_changes_of_exactly_zero() -> None:
    model = model_of(torch.full((5, 7), 0.1))
    row = last(recorded(model, lambda: None)[0])
    assert [row[name] for name in MEASURES] == [0, 0, 0]
    assert math.isnan(row["unit_coupling"])


@pytest.mark.parametrize("scale", [1e-42, 1e-45])
def test_denormal_weights(scale: float) -> None:
    before = (torch.randint(1, 90, (5, 7)) * scale).float()
    after = before + (torch.randint(0, 30, (5, 7)) * scale).float()
    model = model_of(before)
    row = last(recorded(model, lambda: model["query"].weight.copy_(after))[0])
    v, w = (t.double().numpy() * 1e40 for t in (after, before))
    norms = np.linalg.norm(v, axis=1), np.linalg.norm(w, axis=1)
    assert row["delta_magnitude"] * 1e40 == pytest.approx(
        np.abs(norms[0] - norms[1]).mean(), rel=1e-6
    )
    cosine = (v * w).sum(1) / norms[0] / norms[1]
    assert row["delta_direction"] == pytest.approx((1 - cosine).mean(), rel=1e-6)


def test_a_turn_too_small_for_fp32_keeps_its_digits(tmp_path: Any) -> None:
    before = torch.zeros(5, 7, dtype=torch.float64)
    before[:, 0] = 1
    after = before.clone()
    after[:, 1] = 1e-22  # 1 − cos is 5e-45, subnormal in fp32
    model = model_of(before)
    table, _ = recorded(model, lambda: model["query"].weight.copy_(after), run_dir=tmp_path / "r")
    assert last(table)["delta_direction"] == pytest.approx(5e-45, rel=1e-6, abs=0)
    assert last(dd.load_runs(tmp_path / "r"))["delta_direction"] == last(table)["delta_direction"]


def test_a_parameter_put_in_the_weights_place_is_followed() -> None:
    model = model_of()
    before = model["query"].weight.detach().clone()
    new = torch.randn(5, 7)

    def replace() -> None:
        model["query"].weight = nn.Parameter(new.clone())

    table, _ = recorded(model, replace)
    expected = dd.weight_change(before, new)
    assert last(table)["delta_direction"] == pytest.approx(expected.delta_direction, rel=1e-6)


UNMEASURED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "more rows": (lambda: torch.randn(6, 7), r"has the shape \(6, 7\) now"),
    "fewer rows": (lambda: torch.randn(4, 7), r"has the shape \(4, 7\) now"),
    "more columns": (lambda: torch.randn(5, 8), r"has the shape \(5, 8\) now"),
    "no values": (lambda: torch.empty(5, 7, device="meta"), "is on the meta device"),
    "no numbers": (lambda: torch.zeros(5, 7, dtype=torch.int32), "floating"),
}


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("case", UNMEASURED)
def test_a_weight_that_cannot_be_measured_costs_its_own_rows_and_one_warning(
    case: str, axis: Any, tmp_path: Any
) -> None:
    make, reason = UNMEASURED[case]
    right = nn.Parameter(torch.randn(5, 7))

    def put(weight: nn.Parameter) -> None:
        model["query"].weight = weight

    def spoil() -> None:
        put(nn.Parameter(make(), requires_grad=False))

    def grow() -> None:
        model["value"].weight.mul_(1.5)

    model = model_of()
    kept = {"keep": ["units", "weights"], "run_dir": tmp_path / "r"}
    events = (lambda: put(right), spoil, grow, lambda: put(right))
    table, said = recorded(model, *events, axis=axis, **kept)
    assert len(said) == 1
    assert re.match(f"at step 2 the weight of query cannot be measured .*{reason}", said[0])
    assert said[0].endswith(
        "its rows are NaN as long as that lasts; the other weights are recorded."
    )
    query, value = (table[table["site"] == site] for site in ("query", "value"))
    assert query["step"].tolist() == value["step"].tolist() == [0, 1, 2, 3, 4]
    assert (query["units"] == {"output": 5, "input": 7}[axis]).all()
    assert query["non_finite"].tolist() == [0, 0, *[query["units"].iloc[0]] * 2, 0]
    for name in MEASURES:
        assert query[name].isna().tolist() == [False, False, True, True, False]
        assert query[name].iloc[4] == query[name].iloc[1]
        assert value[name].notna().all()
    assert value["delta_magnitude"].tolist()[2:] != [0, 0, 0]
    pd.testing.assert_frame_equal(dd.load_runs(tmp_path / "r"), table.assign(run="r"))
    pd.testing.assert_frame_equal(dd.remeasure(tmp_path / "r"), table.assign(run="r"))
    assert [len(dd.load_units(tmp_path / "r", step)) for step in range(5)] == [2, 2, 1, 1, 2]
    model = model_of()
    with pytest.raises((ValueError, TypeError), match=reason):
        recorded(model, spoil, strict=True)


def test_a_model_without_values_is_refused_as_that() -> None:
    with torch.device("meta"):
        model = model_of()
    with pytest.raises(InputError, match="query had no values when the recorder was made"):
        dd.Recorder(model, ["query"]).record()
    early = dd.Recorder(model, ["query"])
    model.to_empty(device="cpu")
    with pytest.raises(InputError, match=r"on the meta device.*after the weights are loaded"):
        early.start(torch.optim.SGD(model.parameters()))


def test_all_weights_may_be_unmeasured_and_it_is_told_again_when_it_comes_back() -> None:
    model = model_of()
    before = {name: model[name].weight for name in model}

    def spoil() -> None:
        for name in model:
            model[name].weight = nn.Parameter(torch.empty(5, 7, device="meta"))

    def mend() -> None:
        for name in model:
            model[name].weight = before[name]

    table, said = recorded(model, spoil, mend, spoil)
    assert len(said) == 2
    assert all("cannot be measured" in message and "nor can 1 more" in message for message in said)
    assert table["delta_direction"].isna().tolist() == [False, False, True, True] * 2
    recorder = dd.Recorder(model_of(), ["query"])
    recorder._model["query"].weight = nn.Parameter(torch.empty(5, 7, device="meta"))  # type: ignore[index]
    with pytest.raises(ValueError, match="meta device"):  # asked for by hand, it is told at once
        recorder.record()


def test_recording_by_hand_costs_no_training_either() -> None:
    """As the Trainer's callback does when a checkpoint is saved."""
    model = model_of()
    recorder = dd.Recorder(model, ["query", "value"], every=100)
    with recorder.attach(torch.optim.SGD(model.parameters(), lr=0.1)):
        model["query"].weight = nn.Parameter(torch.randn(6, 7))
        recorder.step = 1
        with pytest.warns(UserWarning, match="the weight of query cannot be measured"):
            recorder.record()
    assert recorder.trajectory["delta_direction"].isna().tolist() == [False, False, True, False]


def test_steps_that_a_gradient_scaler_skips_are_none() -> None:
    model = model_of()
    recorder = dd.Recorder(model, ["query"], every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    with recorder.attach(optimizer):
        for factor in (1.0, math.inf, 1.0):
            optimizer.zero_grad()
            loss = model["query"](torch.ones(2, 7)).square().sum() * factor
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
    assert recorder.step == 2
    assert recorder.trajectory["step"].tolist() == [0, 1, 2]
