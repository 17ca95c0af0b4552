"""What a loop allows for its own speed (TF32, autocast) does not reach what is read of its layers.

PEFT's DEFT computes in fp32 whatever it is given. On a GPU, where
`torch.set_float32_matmul_precision("high")` makes that TF32, it was refused as not affine.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dora_dynamics as dd
from dora_dynamics._precision import full_precision
from dora_dynamics.effective import NoDenseWeightError, dense_weight, private_copy
from dora_dynamics.effective.peft_weights import how_read

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


class TensorCores(TorchDispatchMode):
    """Products of float32 matrices as a GPU takes them: of TF32 numbers, where that is allowed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS and torch.get_float32_matmul_precision() != "highest":
            args = tuple(tf32(x) if isinstance(x, torch.Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to the 10 bits of mantissa that TF32 has."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class Gated(nn.Module):
    """Hardly, and yet, not affine."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        return y * (1 + 1e-3 * torch.tanh(y))


@pytest.fixture(params=["TF32", "autocast"])
def reduced(request: pytest.FixtureRequest) -> Any:
    """Inside of it, products of float32 matrices have three digits."""
    loop: AbstractContextManager[Any] = TensorCores()
    if request.param == "autocast":
        loop = torch.autocast("cpu", torch.bfloat16)
    else:
        torch.set_float32_matmul_precision("high")
    with loop:
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        error = (x @ x).double() - x.double() @ x.double()
        assert 1e-4 < error.abs().max() < 1e-1
        yield
    torch.set_float32_matmul_precision("highest")


def deft() -> nn.Module:
    if "DEFT" not in peft.PeftType.__members__:
        pytest.skip("this PEFT has no DEFT")
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"query": nn.Linear(20, 28)})
    kind: Any = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType("DEFT")]
    adapted: Any = peft.get_peft_model(model, kind(target_modules=["query"], r=4))
    layer: nn.Module = adapted.base_model.model["query"]
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def expected(layer: Any) -> torch.Tensor:
    """(I − P relu(P)ᵀ) W + P R, in float64."""
    P, R = (part["default"].double() for part in (layer.deft_P, layer.deft_R))
    W = layer.base_layer.weight.double()
    weight: torch.Tensor = W - P @ (P.relu().T @ W) + P @ R
    return weight.detach()


def test_deft_is_merged(reduced: None) -> None:
    layer = deft()
    assert how_read(layer) == "merge on a copy"
    weight = dense_weight(layer)
    with full_precision(["cpu"]):
        torch.testing.assert_close(weight, expected(layer), rtol=0, atol=1e-6)


def test_it_was_that(reduced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loop's own precision the same layer is refused, with the words seen on a GPU."""
    monkeypatch.setattr(private_copy, "full_precision", lambda devices: nullcontext())
    with pytest.raises(NoDenseWeightError, match="DEFT is not affine in its input"):
        dense_weight(deft())


def test_what_is_not_affine_is_refused(reduced: None) -> None:
    with pytest.raises(NoDenseWeightError, match="Gated is not affine in its input"):
        dense_weight(Gated(nn.Linear(20, 28)))


def test_rows_are_the_same(reduced: None) -> None:
    """Of the whole recorder, which is often called inside of autocast: DEFT, LoRA and DoRA."""
    tables = []
    for context in (full_precision(["cpu"]), nullcontext()):
        torch.manual_seed(0)
        layer: Any = deft()
        model: Any = nn.ModuleDict(
            {"query": layer, "key": nn.Linear(20, 28), "value": nn.Linear(20, 28)}
        )
        dd.apply_lora(model, ["key"], rank=2)
        dd.apply_dora(model, ["value"], rank=2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.add_(0.1)
        baseline = {"query.weight": layer.get_base_layer().weight.clone()}
        for name in ("key", "value"):
            baseline[f"{name}.weight"] = (
                model[name].parametrizations.weight.original.detach().clone()
            )
        recorder = dd.Recorder(model, list(model), method="mixed", baseline=baseline)
        with context:
            recorder.record()
        tables.append(recorder.trajectory.set_index("site")[["delta_magnitude", "delta_direction"]])
    exact, ours = tables
    assert (exact > 0).all(axis=None)
    assert ((ours - exact).abs() <= 1e-12 * exact.abs()).all(axis=None)


def fail_inside() -> None:
    with full_precision(["cpu", "cuda"]):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "highest"
        raise ZeroDivisionError


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_was_set_is_set_again(precision: str) -> None:
    def state() -> list[object]:
        matmuls = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
        return [getattr(matmul, "fp32_precision", None) for matmul in matmuls]

    try:
        torch.set_float32_matmul_precision(precision)
        before = state()
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(ZeroDivisionError):
                fail_inside()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == precision
        assert state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
