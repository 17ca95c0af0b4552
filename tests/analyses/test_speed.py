"""The recipes that measure speed, at their smallest: what they count and write, never seconds."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analyses import _performance, _tables, growth
from analyses._performance import balanced_orders

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ["--quick", "--device", "cpu"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def only_table(out: Path, name: str) -> pd.DataFrame:
    (path,) = (out / "analyses" / "results").glob(f"{name}_*.csv")
    table = pd.read_csv(path)
    assert {"machine", "versions", "seed"} <= set(table.columns)
    for ending in ("png", "svg"):
        assert (out / "figures" / f"{name}.{ending}").stat().st_size > 0
    return table


def test_observer_cost(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from analyses import observer_cost

    observer_cost.main([*QUICK, "--out", str(tmp_path)])
    table = only_table(tmp_path, "observer_cost").set_index(["method", "place"])
    assert (table["step_ms"] > 0).all()
    assert (table["hook_ms"] > 0).all()
    assert (table["followed_parameters"] == table["followed_parameters"].iloc[0]).all()
    followed = 4 * table["followed_parameters"].iloc[0] / 1e6
    assert table.loc[("FT", "device"), "copied_mb"] == pytest.approx(followed, rel=1e-4)
    assert table.loc[("FT", "file"), "copied_mb"] == 0
    assert table.loc[("FT", "file"), "mapped_mb"] == pytest.approx(followed, rel=1e-4)
    for column in ("copied_mb", "mapped_mb"):
        assert table.loc[("LoRA", "device"), column] == 0

    drawn = (tmp_path / "figures" / "observer_cost.svg").read_bytes()
    observer_cost.main(["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "figures" / "observer_cost.svg").read_bytes() == drawn


def test_what_is_measured_is_written_though_the_rest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from analyses import observer_cost

    measure = observer_cost.measure

    def failing(setting: Any, *more: Any) -> Any:
        if setting.place != "device":
            raise RuntimeError("cut off")
        return measure(setting, *more)

    monkeypatch.setattr(observer_cost, "measure", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        observer_cost.main([*QUICK, "--out", str(tmp_path)])
    (path,) = (tmp_path / "analyses" / "results").glob("observer_cost_*.csv")
    assert len(pd.read_csv(path)) == 1
    on_gpu = observer_cost.settings("cuda", quick=False)
    assert sum(setting.seconds for setting in on_gpu) <= 40


def test_every_linear_weight_is_followed() -> None:
    """As many as there are linear layers, in either model; the classifier and pooler too."""
    pytest.importorskip("transformers")
    from analyses._training import Shape, model_of
    from dora_dynamics.sites import find_sites

    beside: dict[str, set[str]] = {"llama": set(), "bert": {"classifier"}}
    for family in beside:
        shape = Shape("tiny", family, 16, 24, 2, 4, 2, 20, 2, 4)
        model = model_of(shape, "cpu")
        linears = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert {site.name for site in find_sites(model, shape.targets)} == linears - beside[family]


def test_adapter_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from analyses import adapter_cost

    adapter_cost.main([*QUICK, "--out", str(tmp_path)])
    table = only_table(tmp_path, "adapter_cost").set_index("variant")
    trained = table[~table["merged"] & (table["by"] != "original")]
    assert set(trained["by"]) == {"ours", "PEFT"}
    assert (trained[["forward_ms", "backward_ms", "kept_mb"]] > 0).all(axis=None)
    kept = trained["kept_mb"]
    assert kept["DoRA detached, ours"] < kept["DoRA exact, ours"]
    assert (table.loc[table["merged"], "latency_ratio"] > 0).all()
    assert table.loc["original", "latency_ratio"] == 1
    assert len(table[table.index.str.startswith("original again")]) == adapter_cost.AGAIN

    monkeypatch.setattr(_tables, "version", lambda _: "")
    assert {variant.by for variant in adapter_cost.variants()} == {"original", "ours"}


def test_variants_of_a_method_are_the_same_model() -> None:
    """Ours and PEFT's give the same outputs from the same factors."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from analyses import adapter_cost
    from analyses._training import batch_of

    shape = adapter_cost.shapes("cpu", quick=True)[0]
    batch = batch_of(shape, "cpu")
    logits = {}
    for variant in adapter_cost.variants():
        model: Any = adapter_cost.adapted(variant, shape, "cpu", rank=2).eval()
        if variant.by != "original" and not variant.merged:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name and parameter.ndim == 2:
                        values = torch.arange(1, parameter.numel() + 1).sin() / 3
                        parameter.copy_(values.view_as(parameter))
        logits[variant.name] = model(**batch).logits.detach()
    for method in ("LoRA", "DoRA detached"):
        torch.testing.assert_close(logits[f"{method}, ours"], logits[f"{method}, PEFT"])
        assert not torch.allclose(logits[f"{method}, ours"], logits["original"], atol=1e-4)


def test_growth(tmp_path: Path) -> None:
    growth.main([*QUICK, "--out", str(tmp_path)])
    table = only_table(tmp_path, "growth")
    assert set(table["growth"]) == set(growth.UNITS)
    assert (table["median_ms"] > 0).all()
    drawn = (tmp_path / "figures" / "growth.svg").read_text()
    growth.main(["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "figures" / "growth.svg").read_text() == drawn


def test_growth_that_is_cut_off_is_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("cut off")

    monkeypatch.setattr(growth, "with_rank", failing)
    with pytest.raises(RuntimeError, match="cut off"):
        growth.main([*QUICK, "--out", str(tmp_path)])
    growth.main(["--redraw", "--out", str(tmp_path)])
    assert set(only_table(tmp_path, "growth")["growth"]) == {"parameters", "sites"}


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_balanced_orders(count: int) -> None:
    """Every way as often in each position, and as often right after each other way."""
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    for position in range(count):
        there = Counter(order[position] for order in orders)
        assert set(there.values()) == {len(orders) // count}
    neighbours = Counter(pair for order in orders for pair in pairwise(order))
    assert len(neighbours) == count * (count - 1)
    assert len(set(neighbours.values())) == 1


def test_turns_are_balanced() -> None:
    """In at least as many turns as were asked for, in whole squares, one turn to warm up."""
    pytest.importorskip("transformers")
    from analyses import adapter_cost

    order: list[int] = []

    def work(i: int) -> tuple[float, float]:
        order.append(i)
        return float(len(order)), float(i)

    found = adapter_cost.in_balanced_turns([partial(work, i) for i in range(4)], 5)
    assert [times.shape for times in found] == [(8, 2)] * 4
    assert order[:4] == [0, 1, 2, 3]
    assert [order[4 + 4 * t : 8 + 4 * t] for t in range(8)] == 2 * balanced_orders(4)
    for i, times in enumerate(found):
        assert (times[:, 1] == i).all()


@pytest.mark.parametrize("host_takes", [1, 5, 1000])
def test_work_is_timed_from_when_all_of_it_is_queued(
    host_takes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is not there: time is counted in the shortest sleeps, the work takes two."""
    now = done_at = 0.0

    class Event:
        at = 0.0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(now, done_at)

        def query(self) -> bool:
            return self.at <= now

        def synchronize(self) -> None:
            nonlocal now
            now = max(now, self.at)

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def busy(cycles: float) -> None:
        nonlocal done_at
        done_at = max(now, done_at) + cycles / _performance.SHORTEST

    def work() -> None:
        nonlocal now
        for _ in range(2):
            now += host_takes / 2
            busy(_performance.SHORTEST)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", busy)
    if host_takes <= _performance.LONGEST // _performance.SHORTEST:
        assert _performance.when_queued(work) == pytest.approx(2e-3)
    else:
        with pytest.raises(RuntimeError, match="waits for the GPU"):
            _performance.when_queued(work)


def test_fit_of_a_straight_line() -> None:
    found = {size: [0.5 + 0.25 * size] * 3 for size in (1, 10, 100, 1000)}
    table = growth.table_of("sites", "alone", found)
    np.testing.assert_allclose(table["slope_ms"], 250)
    np.testing.assert_allclose(table["intercept_ms"], 500)
    np.testing.assert_allclose(table["r_squared"], 1)
    assert table["exponent"].iloc[0] == pytest.approx(1, abs=0.02)
    square = growth.table_of(
        "sites", "alone", {size: [1e-6 * size**2] for size in (1, 10, 100, 1000)}
    )
    assert square["r_squared"].iloc[0] < 0.995
    assert square["exponent"].iloc[0] == pytest.approx(2)


def test_nothing_to_redraw_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run without --redraw first"):
        growth.main(["--redraw", "--out", str(tmp_path)])
