"""A record makes one transfer from device to host, and touches the chosen sites alone.

Counted on a GPU where there is one, and everywhere on `Far` tensors: their values lie in host
memory, but they say that they are on another device, and only a copy gets them from there.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import dora_dynamics as dd
from dora_dynamics.runs import snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Build = Callable[..., nn.Module]

FAR = "meta"  # the one device but the CPU that every build of torch knows
FARTHER = "meta:1"
GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
aten: Any = torch.ops.aten
TARGETS = ["query", "value"]


class Far(torch.Tensor):
    """A tensor on a device that is not there."""

    held: torch.Tensor
    place = FAR
    is_meta = False  # it has values

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Far:
        make: Any = torch.Tensor._make_wrapper_subclass
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor: Far = make(cls, held.shape, dtype=held.dtype, device=cls.place, **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        stays = goes_to(kwargs) != "cpu" and func.overloadpacket is not aten._local_scalar_dense
        if func.overloadpacket is aten.copy_ and not isinstance(args[0], Far):
            return func(args[0], args[1].held)
        near = tree_map(lambda x: x.held if isinstance(x, Far) else x, (args, kwargs))
        if "device" in kwargs:
            near[1]["device"] = torch.device("cpu")
        result = func(*near[0], **near[1])
        known = {id(x.held): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Far)}

        def far(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else cls(x)

        return tree_map(far, result) if stays else result


class Farther(Far):
    """A tensor on another such device."""

    place = FARTHER


def goes_to(kwargs: dict[str, Any]) -> str:
    device = kwargs.get("device")
    return "" if device is None else torch.device(device).type


class Watch(TorchDispatchMode):
    """Counts the copies from a device to the host, and notes every tensor that is touched."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: list[str] = []
        self.touched: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        self.touched += given
        if goes_to(kwargs) == FAR and not any(isinstance(x, Far) for x in given):
            far = Farther if torch.device(kwargs["device"]).index == 1 else Far
            return far(func(*args, **kwargs | {"device": torch.device("cpu")}))
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        source = given[-1] if packet is aten.copy_ else given[0] if given else None
        to_host = (
            packet is aten._local_scalar_dense
            or (packet is aten._to_copy and result.device.type == "cpu")
            or (packet is aten.copy_ and given[0].device.type == "cpu")
        )
        if to_host and source is not None and source.device.type != "cpu":
            self.transfers.append(f"{func} {tuple(source.shape)}")
        return result


def put(model: nn.Module, device: str) -> nn.Module:
    if device not in (FAR, FARTHER):
        return model.to(device)
    kind = Far if device == FAR else Farther
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                far = nn.Parameter(kind(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = far
    return model


def adapt(model: nn.Module, method: str) -> nn.Module:
    source = torch.Generator().manual_seed(0)
    if method in ("LoRA", "mixed"):
        dd.apply_lora(model, ["layers.0.query", "layers.1.value"], rank=2, generator=source)
    if method in ("DoRA", "mixed"):
        dd.apply_dora(model, ["layers.1.query", "layers.0.value"], rank=2, generator=source)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    """A step of training in all but the gradients."""
    source = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            change = 0.1 * torch.randn(parameter.shape, generator=source)
            own: Any = type(parameter.detach())
            parameter.add_(own(change) if issubclass(own, Far) else change.to(parameter.device))


def check_same(tables: Sequence[pd.DataFrame]) -> None:
    """Two tables tell the same changes, and changes there are."""
    columns = ["delta_magnitude", "delta_direction", "update_norm"]
    ours, theirs = (table[columns].to_numpy() for table in tables)
    assert abs(ours - theirs).max() <= 1e-6 * abs(ours).max()
    assert ours.max(0).min() > 0


@pytest.mark.parametrize("granularity", ["matrix", "head"])
@pytest.mark.parametrize("method", ["FT", "LoRA", "DoRA", "mixed"])
@pytest.mark.parametrize("device", [FAR, GPU])
def test_one_transfer_and_only_chosen_weights(
    device: str, method: str, granularity: Any, tiny_transformer: Build
) -> None:
    tables = []
    for where in ("cpu", device):
        model: Any = tiny_transformer()
        for block in model.layers:
            block.num_heads, block.head_dim = 2, block.query.out_features // 2
        model = put(adapt(model, method), where)
        targets = TARGETS if granularity == "matrix" else ["query"]
        recorder = dd.Recorder(model, targets, every=1, method=method, granularity=granularity)
        for step in range(3):
            recorder.step = step
            with Watch() as watch:
                recorder.record()
            assert len(watch.transfers) == (where != "cpu"), watch.transfers
            sizes = [re.search(r"\((\d+),\)$", transfer) for transfer in watch.transfers]
            assert all(size and int(size[1]) == 35 * len(recorder.sites) for size in sizes)
            names = {n for n, p in model.named_parameters() if any(p is t for t in watch.touched)}
            assert names
            assert all(any(f".{target}." in name for target in targets) for name in names), names
            move(model)
        tables.append(recorder.trajectory)
    check_same(tables)


SEVERAL = {
    "two far ones": [FAR, FARTHER],
    "one far, one near": ["cpu", FAR],
    "a GPU and the CPU": pytest.param(
        ["cuda", "cpu"],
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ),
    "two GPUs": pytest.param(
        ["cuda:0", "cuda:1"],
        marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    ),
}


@pytest.mark.parametrize("method", ["FT", "LoRA", "DoRA", "mixed"])
@pytest.mark.parametrize("devices", SEVERAL.values(), ids=SEVERAL)
def test_modules_on_several_devices_make_a_transfer_each(
    devices: list[str], method: str, tiny_transformer: Build, tmp_path: Path
) -> None:
    """As pipelines and `device_map` place them; the query and value of a layer apart."""
    tables = []
    for name, where in (("near", ["cpu", "cpu"]), ("apart", devices)):
        model: Any = adapt(tiny_transformer(), method)
        put(model.layers[0], where[0])
        put(model.layers[1].query, where[0])
        put(model.layers[1].value, where[1])
        run = tmp_path / name
        recorder = dd.Recorder(model, TARGETS, method=method, run_dir=run, keep="units", run="r")
        for step in range(3):
            recorder.step = step
            with Watch() as watch:
                recorder.record()
            assert len(watch.transfers) == len({*where} - {"cpu"}), watch.transfers
            move(model)
        tables.append(recorder.trajectory)
    columns = ["delta_magnitude", "delta_direction", "update_norm", "unit_coupling"]
    ours, theirs = (table[columns].to_numpy(na_value=np.nan) for table in tables)
    on_gpu = any(place.startswith("cuda") for place in devices)  # its float32 sums, not the CPU's
    relative, absolute = (1e-5, 1e-5) if on_gpu else (1e-6, 1e-9)
    np.testing.assert_allclose(theirs, ours, rtol=relative, atol=absolute)
    assert tables[0]["site"].tolist() == tables[1]["site"].tolist()


class Turned(nn.Module):
    """Affine, and so probed: y = W_0 (x + (T − Tᵀ) x) + b."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.turn = nn.Parameter(torch.zeros(base.in_features, base.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x + x @ (self.turn - self.turn.T))
        return y


class Exposing(Turned):
    """The same with a `.weight`, which is taken if it is what the module does."""

    honest = True

    @property
    def weight(self) -> torch.Tensor:
        base: Any = self.base_layer.weight
        turned: torch.Tensor = base + base @ (self.turn - self.turn.T).T
        return turned if self.honest else 2 * turned


class Lying(Exposing):
    """And with one that is not, so that it must be probed: known after the first transfer."""

    honest = False


def tables_of(build: Any, device: str, steps: int, **options: Any) -> tuple[Any, list[int]]:
    """The same run on the CPU and on a device, and the transfers of each record there."""
    tables, transfers = [], []
    for where in ("cpu", device):
        model = put(build(), where)
        recorder = dd.Recorder(model, TARGETS, every=1, method="mine", **options)
        for step in range(steps):
            recorder.step = step
            with Watch() as watch:
                recorder.record()
            transfers.append(len(watch.transfers))
            move(model)
        tables.append(recorder.trajectory)
    check_same(tables)
    assert not any(transfers[:steps])
    return tables[0], transfers[steps:]


@pytest.mark.parametrize("kind", [Turned, Exposing, Lying])
@pytest.mark.parametrize("device", [FAR, GPU])
def test_checks_come_in_the_same_transfer(
    device: str, kind: type[Turned], tiny_transformer: Build
) -> None:
    def build() -> nn.Module:
        model: Any = tiny_transformer()
        for layer in model.layers:
            layer.query, layer.value = kind(layer.query), kind(layer.value)
        adapted: nn.Module = model
        return adapted

    table, transfers = tables_of(build, device, steps=3)
    assert transfers == [1 + (kind is Lying), 1, 1]
    if kind is Lying:
        honest, _ = tables_of(partial(swapped, build, Exposing), device, steps=3)
        pd.testing.assert_frame_equal(table, honest)


def swapped(build: Any, kind: type[Turned]) -> nn.Module:
    model: nn.Module = build()
    for module in model.modules():
        if isinstance(module, Turned):
            module.__class__ = kind
    return model


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "mixed"])
@pytest.mark.parametrize("device", [FAR, GPU])
def test_units_of_the_input_come_in_one_transfer(
    device: str, method: str, tiny_transformer: Build
) -> None:
    _, transfers = tables_of(
        lambda: adapt(tiny_transformer(), method), device, steps=2, axis="input"
    )
    assert transfers == [1, 1]


@pytest.mark.parametrize("device", [FAR, GPU])
def test_kept_units_come_in_the_same_transfer(
    device: str, tiny_transformer: Build, tmp_path: Path
) -> None:
    kept = []
    for where in ("cpu", device):
        model = put(adapt(tiny_transformer(), "mixed"), where)
        run = tmp_path / where
        recorder = dd.Recorder(model, TARGETS, run_dir=run, method="mixed", keep="units")
        for step in range(2):
            recorder.step = step
            with Watch() as watch:
                recorder.record()
            assert len(watch.transfers) == (where != "cpu"), watch.transfers
            move(model)
        recorder.state_dict()
        kept.append(snapshots.load_units(run, 1))
    assert kept[0].keys() == kept[1].keys()
    for site, units in kept[0].items():
        for one, other in zip(units.arrays(), kept[1][site].arrays(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", [FAR, GPU])
def test_the_count_sees_every_way_to_the_host(device: str) -> None:
    """What it is made of would be noticed: a number, a copy, a copy into a host tensor."""
    values = torch.arange(6.0).reshape(2, 3)
    there: Any = Far(values) if device == FAR else values.to(device)
    with Watch() as watch:
        assert there.sum().item() == 15
        assert torch.equal(there.cpu(), values)
        here = torch.empty(2, 3).copy_(there * 2)
        assert torch.equal(here, 2 * values)
        assert bool((there >= 0).all())
        assert there.t().to(torch.float64).device.type == torch.device(device).type
    assert len(watch.transfers) == 4
