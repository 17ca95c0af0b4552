"""Quantised bases: decoded to measure from, or measured from the 16-bit weights they came from."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.effective import (
    LowRank,
    NoDenseWeightError,
    dense_weight,
    dequantized,
    effective_weight,
    is_quantized,
    quantized,
)
from dora_dynamics.effective.peft_weights import how_read
from dora_dynamics.sites import models
from tests.effective.peft_cases import QALORA, PackedLinear

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IS_QUANTISED = r"the base weights are quantised"


@pytest.fixture(autouse=True)
def forget_registrations() -> Iterator[None]:
    before, classes = dict(quantized._dequantizers), list(models._linear_classes)
    yield
    quantized._dequantizers.clear()
    quantized._dequantizers.update(before)
    models._linear_classes[:] = classes


class Int8Linear(nn.Linear):
    """The least there is to quantisation: 8-bit codes and one scale per row."""

    codes: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: nn.Linear, levels: int = 127) -> None:
        super().__init__(layer.in_features, layer.out_features)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / levels
        codes = (layer.weight.detach() / scale).round().to(torch.int8)
        del self.weight
        self.register_buffer("weight", None)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.codes * self.scale, self.bias)


class Net(nn.Module):
    """One layer to quantise, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query: Any = nn.Linear(16, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.query(x).tanh())
        return y


class Wrapped(nn.Module):
    """LoRA by hand around any layer."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.A = nn.Parameter(torch.randn(2, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x) + x @ self.A.T @ self.B.T
        return y


def nets(levels: int = 127) -> tuple[Net, Net]:
    """A model, and the same with its query quantised."""
    dd.register_dequantizer(Int8Linear, lambda layer: layer.codes * layer.scale)  # type: ignore[operator]
    torch.manual_seed(0)
    plain = Net()
    quant = copy.deepcopy(plain)
    quant.query = Int8Linear(plain.query, levels).requires_grad_(False)
    return plain, quant


def run(model: nn.Module, recorder: dd.Recorder) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with recorder.attach(optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(5, 16)).square().mean().backward()
            optimizer.step()


def test_registered_and_self_unpacking_layers() -> None:
    plain, quant = nets()
    packed = PackedLinear(plain.query)
    for layer, expected in (
        (quant.query, quant.query.codes * quant.query.scale),
        (packed, (packed.qweight * packed.scale).T),
    ):
        assert is_quantized(layer)
        assert torch.equal(dequantized(layer), expected)
        assert torch.equal(dense_weight(layer), expected)
    assert not is_quantized(plain.query)


def test_a_square_layer_is_not_taken_the_wrong_way_round() -> None:
    """GPTQ's layers decode to (in, out), and the shape of a square one does not tell."""
    torch.manual_seed(0)
    layer = PackedLinear(nn.Linear(16, 16))
    basis = torch.eye(16)
    expected = (layer(basis) - layer(0 * basis)).T
    torch.testing.assert_close(dense_weight(layer), expected.detach(), rtol=1e-5, atol=1e-6)


def test_an_unknown_kind_says_what_to_do() -> None:
    layer = nn.Linear(4, 4)
    layer.register_buffer("qweight", torch.zeros(2, 4, dtype=torch.int8))
    with pytest.raises(NoDenseWeightError, match="register_dequantizer"):
        dequantized(layer)


def test_an_adapter_around_a_quantised_layer_is_probed() -> None:
    _, quant = nets()
    base = dequantized(quant.query)
    wrapped = Wrapped(quant.query)
    nn.init.normal_(wrapped.B)
    expected = base.double() + wrapped.B.double() @ wrapped.A.double()
    torch.testing.assert_close(dense_weight(wrapped), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_peft_on_a_quantised_base(options: dict[str, Any], tmp_path: Path) -> None:
    plain, quant = nets()
    reference = dequantized(quant.query).double()
    base = copy.deepcopy(plain)
    base.query.weight.data = reference.float()  # what PEFT's own classes see of the real ones
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **options)
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(base, config)
    expected = dense_weight(model.base_model.model.query)
    layer = model.base_model.model.query
    layer.base_layer = quant.query
    weight = effective_weight(layer)
    assert isinstance(weight, LowRank)
    torch.testing.assert_close(dense_weight(layer), expected)
    with pytest.warns(UserWarning, match=IS_QUANTISED + r".*Int8Linear.*baseline="):
        recorder = dd.Recorder(model, ["query"], run_dir=tmp_path / "run")
    recorder.record()
    change = dd.weight_change(reference, expected)
    row: Any = recorder.trajectory.iloc[0]
    assert row["update_norm"] == pytest.approx(change.update_norm, rel=1e-6)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "dequantised (Int8Linear" in info["baseline"]


def test_the_16_bit_reference_tells_how_large_the_error_is(tmp_path: Path) -> None:
    plain, quant = nets(levels=7)
    baseline = dd.capture_baseline(plain, ["query"])
    quant.query = Wrapped(quant.query)
    recorder = dd.Recorder(
        quant, ["query"], baseline=baseline, run_dir=tmp_path / "run", method="mine"
    )
    with pytest.warns(UserWarning, match=r"quantisation error .* times the update at step 2"):
        run(quant, recorder)
    error = (dequantized(quant.query.base_layer) - plain.query.weight).norm()
    wrapped = quant.query
    update = (wrapped.B @ wrapped.A).norm()
    row: Any = recorder.trajectory.query("step == 0").iloc[0]
    assert row["update_norm"] == pytest.approx(error.item(), rel=1e-5)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"is {(error / update).item():.2g} times the update" in info["baseline"]
    assert "captured from the Net" in info["baseline"]


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*PackedLinear")
def test_qalora() -> None:
    """A of QALoRA sees the sums of groups of four inputs, each times 16 / 4² (PEFT's scaling)."""
    pytest.importorskip("peft", "0.19", reason="before, a layer took no configuration")

    def train(model: Any) -> None:
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with recorder.attach(optimizer) if recorder._model is model else contextlib.nullcontext():
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(4, 3, 16)).square().mean().backward()
                optimizer.step()

    model, other = (QALORA.adapt(QALORA.build()) for _ in range(2))
    with pytest.warns(UserWarning, match=IS_QUANTISED):
        recorder = dd.Recorder(model, ["query"], every=1)
    train(model)
    train(other)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    layer = model.query
    base = layer.base_layer.dequantize_weight().T.double()
    expected = qalora_weight(layer, base)
    torch.testing.assert_close(dense_weight(layer), expected, rtol=0, atol=1e-6)
    assert how_read(layer) == QALORA.how
    change = dd.weight_change(base, expected)
    row: Any = recorder.trajectory.query("step == 3").iloc[0]
    assert row["update_norm"] == pytest.approx(change.update_norm, rel=1e-6)


def qalora_weight(layer: Any, base: torch.Tensor) -> torch.Tensor:
    """A of QALoRA sees the sums of groups of four inputs, each times in / 4² (PEFT's scaling)."""
    A, B = (getattr(layer, f"lora_{which}")["default"].weight.double() for which in "AB")
    product = (B @ A).repeat_interleave(4, dim=1) * base.shape[1] / 16
    weight: torch.Tensor = base.double() + layer.scaling["default"] * product
    return weight.detach()


def same_as_applied(layer: nn.Module, weight: torch.Tensor, tolerance: float) -> None:
    """The layer's outputs on random inputs against those of a weight, on the inputs themselves."""
    x = torch.randn(16, weight.shape[1])
    with torch.no_grad():
        applied = layer(x) - layer(torch.zeros_like(x))
    expected = x @ weight.T.float()
    assert (applied - expected).norm() <= tolerance * expected.norm()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_bitsandbytes(kind: str, mode: str) -> None:
    """In eval mode a 4-bit layer on a CPU repacks its codes when it is called."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model: Any = nn.Sequential()
    plain = nn.Linear(64, 128)
    weight = plain.weight.detach().clone()
    if kind == "Linear4bit":
        layer = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        model.is_loaded_in_4bit = True
    else:
        layer = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
        model.is_loaded_in_8bit = True
    layer.bias = plain.bias
    model.add_module("query", layer.to("cpu"))
    fresh = dequantized(layer)
    error = (fresh - weight).norm() / weight.norm()
    assert 0 < error < (0.2 if kind == "Linear4bit" else 0.02)
    with torch.no_grad():
        getattr(model, mode)()(torch.randn(3, 64))
    held = layer.weight
    torch.testing.assert_close(dequantized(layer), fresh, rtol=0, atol=2e-3)
    assert layer.weight is held
    same_as_applied(layer, dequantized(layer), 0.02)
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    adapted: Any = getattr(peft.get_peft_model(model, config), mode)()
    same_as_applied(
        adapted.base_model.model.query, dense_weight(adapted.base_model.model.query), 0.02
    )
    with pytest.warns(UserWarning, match=rf"quantised \({kind} of .*; baseline="):
        dd.Recorder(adapted, ["query"]).record()
    assert layer.weight is held


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = Net()
    original = model.query.weight.detach().clone()
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "query"
    )
    assert is_quantized(model.query)
    assert not is_quantized(model.head)
    error = (dequantized(model.query) - original).norm() / original.norm()
    assert 0 < error < 0.02
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config).eval()
    layer = adapted.base_model.model.query
    with torch.no_grad():
        expected = (layer(torch.eye(16)) - layer(torch.zeros(1, 16))).T
    torch.testing.assert_close(dense_weight(layer).float(), expected, rtol=1e-5, atol=1e-6)


SIZES = [(32, 64), (32, 32)]
"""The second, because a transposed square weight would look right."""


def grouped(weight: torch.Tensor, group: int = 16, bits: int = 4) -> tuple[torch.Tensor, ...]:
    """Scales and zeros, (out, groups), of 4-bit codes, and the weight that they stand for."""
    groups = weight.detach().unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / (2**bits - 1)).to(torch.float16).float()
    zero = (-low / scale).round()
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return scale, zero, ((codes - zero[..., None]) * scale[..., None]).flatten(1)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["GPTQ", "AWQ"])
def test_gptqmodel(kind: str, sizes: tuple[int, int]) -> None:
    """The real layers of GPTQ and AWQ; GPTQModel is too heavy for an extra of this package."""
    pytest.importorskip("gptqmodel", reason="GPTQModel is not installed")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    torch.manual_seed(0)
    plain = nn.Linear(*sizes)
    scale, zero, expected = grouped(plain.weight)
    plain.weight.data = expected.clone()  # the packing rounds by itself, without a bound
    layer_class = TorchLinear if kind == "GPTQ" else AwqTorchLinear
    layer: Any = layer_class(
        bits=4, group_size=16, sym=False, desc_act=False, in_features=sizes[0],
        out_features=sizes[1], bias=True, register_buffers=True,
    )  # fmt: skip
    if kind == "GPTQ":
        layer.pack_original(plain, scale, zero, g_idx=torch.arange(sizes[0]) // 16)
    else:
        layer.pack(plain, scale, zero)
    layer.eval()
    assert is_quantized(layer)
    torch.testing.assert_close(dequantized(layer).float(), expected, rtol=2e-3, atol=1e-5)
    check_lora_on(layer, sizes)
    if kind == "GPTQ":
        config = peft.LoraConfig(
            r=2, target_modules=["query"], init_lora_weights=False, use_qalora=True,
            qalora_group_size=4,
        )  # fmt: skip
        holder = nn.ModuleDict({"query": layer, "head": nn.Linear(sizes[1], 3)})
        model: Any = peft.get_peft_model(holder, config)
        query = model.base_model.model["query"]
        torch.testing.assert_close(
            dense_weight(query), qalora_weight(query, dequantized(layer)), rtol=0, atol=1e-6
        )
        assert how_read(query) == QALORA.how


@pytest.mark.parametrize("sizes", SIZES)
def test_autoawq(sizes: tuple[int, int]) -> None:
    gemm = pytest.importorskip("awq.modules.linear.gemm", reason="AutoAWQ is not installed")
    torch.manual_seed(0)
    plain = nn.Linear(*sizes)
    scale, zero, expected = grouped(plain.weight)
    plain.weight.data = expected.clone()  # the packing rounds by itself, without a bound
    layer = gemm.WQLinear_GEMM.from_linear(
        plain, w_bit=4, group_size=16, scales=scale.T.contiguous(), zeros=zero.T.contiguous()
    )
    torch.testing.assert_close(dequantized(layer).float(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_hqq(sizes: tuple[int, int]) -> None:
    quantize = pytest.importorskip("hqq.core.quantize", reason="HQQ is not installed")
    torch.manual_seed(0)
    plain = nn.Linear(*sizes)
    before = plain.weight.detach().clone()
    layer = quantize.HQQLinear(
        plain, quantize.BaseQuantizeConfig(nbits=4, group_size=16),
        compute_dtype=torch.float32, device="cpu",
    )  # fmt: skip
    assert is_quantized(layer)
    basis = torch.eye(sizes[0])
    applied = (layer(basis) - layer(0 * basis)).T.detach()
    torch.testing.assert_close(dequantized(layer), applied, rtol=1e-5, atol=1e-6)
    assert 0 < (dequantized(layer) - before).norm() / before.norm() < 0.15
    check_lora_on(layer, sizes)


def check_lora_on(layer: Any, sizes: tuple[int, int]) -> None:
    """PEFT's own LoRA on a quantised layer: what it decodes to, and the product of the factors."""
    model: Any = nn.ModuleDict({"query": layer, "head": nn.Linear(sizes[1], 3)})
    before = dequantized(layer).double()
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config).eval()
    query = adapted.base_model.model["query"]
    A, B = query.lora_A["default"].weight.double(), query.lora_B["default"].weight.double()
    after = (before + query.scaling["default"] * B @ A).detach()
    torch.testing.assert_close(dense_weight(query), after, rtol=0, atol=1e-9)
    with pytest.warns(UserWarning, match=IS_QUANTISED):
        recorder = dd.Recorder(adapted, ["query"])
    recorder.record()
    row: Any = recorder.trajectory.iloc[0]
    assert row["update_norm"] == pytest.approx(
        dd.weight_change(before, after).update_norm, rel=1e-6
    )
