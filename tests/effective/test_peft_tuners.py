"""Effective weights of every tuner in PEFT's own registry, against merging and probing."""

from __future__ import annotations

import copy
import inspect
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft.tuners.lora import variants
from peft.tuners.lora.layer import LoraVariant
from torch import nn

import dora_dynamics as dd
from dora_dynamics.effective import NoDenseWeightError, dense_weight, is_merged
from dora_dynamics.effective.peft_layers import is_tuner_layer, resolved
from dora_dynamics.effective.peft_weights import how_read
from dora_dynamics.recording.baseline_source import BaselineError
from tests.effective.peft_cases import Case, OnCpu, all_cases
from tests.effective.waits import Waits
from tests.integrations.test_transfers import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

# What PEFT and transformers say when a model is built; nothing of it comes from recording.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor to 1",
        "lora with eva initialization used with low_cpu_mem_usage=False",
        "`lora_bias=True` was passed but the targeted layer",
        "aLoRA is currently only supported for CAUSAL_LM task",
        "Unsupported layer type .*LayerNorm",
        "`is_gradient_checkpointing` is deprecated",
        "Adapter with name .* was active",
        "Already found a `peft_config` attribute",
        "Unmerge result can be inaccurate for",
        "Full backward hook is firing when gradients are computed",
        "Sparse invariant checks are implicitly disabled",
    )
]

OF_PEFT_ITSELF = ("BONE-as it comes", "LORA-conv1d dora", "TRAINABLE_TOKENS-plain")
"""What PEFT before 0.19 cannot merge, unmerge or disable itself."""


def _marks(name: str) -> list[pytest.MarkDecorator]:
    is_old = tuple(map(int, version("peft").split(".")[:2])) < (0, 19)
    return [pytest.mark.skip("PEFT itself fails")] if is_old and name in OF_PEFT_ITSELF else []


ALL = [
    pytest.param(
        kind,
        case,
        id=f"{kind.value}-{case.name}{' refused' if case.refused else ''}",
        marks=_marks(f"{kind.value}-{case.name}"),
    )
    for kind, case in all_cases()
]
FOLLOWABLE = [case for case in ALL if "refused" not in str(case.id)]
REFUSED = [case for case in ALL if "refused" in str(case.id)]
KNOWN_VARIANTS = {
    "ALoraLinearVariant", "ArrowLinearVariant", "BdLoraLinearVariant", "DoraConv1dVariant",
    "DoraConv2dVariant", "DoraConv3dVariant", "DoraEmbeddingVariant", "DoraLinearVariant",
    "KasaLinearVariant", "MiCAEmbeddingVariant", "MiCALinearVariant", "MontecloraLinearVariant",
    "QALoraLinearVariant", "VeloraLinearVariant", "_DoraConvNdVariant",
}  # fmt: skip
STEPS = 3
PEFT_WAITS = {"FROD": {"tolist in peft/tuners/frod/layer.py"}}
"""Where PEFT itself looks at numbers: at two that FRoD makes on the CPU, and that go to a device
only where the model is moved after it was adapted. Records wait for their one transfer alone."""
INSIDE = {"base_layer", "original_module", "ln_tuning_layers", "token_indices"}


def test_every_lora_variant_of_this_peft_is_here() -> None:
    found = {
        name
        for name, cls in inspect.getmembers(variants, inspect.isclass)
        if issubclass(cls, LoraVariant) and cls is not LoraVariant
    }
    assert found <= KNOWN_VARIANTS, f"add {sorted(found - KNOWN_VARIANTS)} to the cases of LORA."


@pytest.mark.parametrize(("kind", "case"), FOLLOWABLE)
def test_weight_is_the_applied_one_and_training_is_undisturbed(kind: str, case: Case) -> None:
    plain = trained(case, record=False)
    followed = trained(case, record=True)
    assert followed.losses == plain.losses
    assert torch.equal(followed.random_state, plain.random_state)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(
            followed.model.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True
        )
    modules = layers(followed.model, case)
    assert followed.waits.keys() == PEFT_WAITS.get(kind, set())
    ways = {how_read(module) for module in modules.values()}
    assert ways == {case.how} or (case.how == "" and ways)
    merged = merged_weights(case, followed.model)
    last = followed.trajectory.query(f"step == {STEPS}").set_index("site")
    assert set(last.index) == set(modules)
    for name, module in modules.items():
        weight = dense_weight(module)
        if merged is not None:
            torch.testing.assert_close(weight.double(), merged[name], rtol=0, atol=1e-6)
        probed = probe(case, followed.model, name)
        if probed is not None:
            torch.testing.assert_close(weight.double(), probed, rtol=0, atol=1e-6)
        assert merged is not None or probed is not None
        before = followed.before[f"{name}.weight"].double()
        if weight.ndim == 2:
            transposed = type(plain_layer(module)).__name__ == "Conv1D"
            pair = (before.T, weight.double().T) if transposed else (before, weight.double())
            change = dd.weight_change(*pair)
            for column in ("delta_direction", "delta_magnitude", "update_norm"):
                assert last[column][name] == pytest.approx(
                    getattr(change, column), rel=1e-5, abs=1e-9
                )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "case"), FOLLOWABLE)
def test_one_transfer_on_a_gpu(kind: str, case: Case) -> None:
    tables = []
    for device in ("cpu", "cuda"):
        model = case.build()
        baseline = dd.capture_baseline(model, case.followed)
        model = case.adapt(model)
        shake(model)
        model.to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        recorder = dd.Recorder(model, case.followed, baseline=baseline)
        recorder.start(optimizer)
        recorder.step = 1
        with Watch() as watch:
            recorder.record()
        if kind not in PEFT_WAITS:
            assert len(watch.transfers) == (device == "cuda"), watch.transfers
        tables.append(recorder.trajectory.query("step == 1")["update_norm"].to_numpy())
    assert tables[1] == pytest.approx(tables[0], rel=1e-4)


@pytest.mark.parametrize(("kind", "case"), FOLLOWABLE)
def test_base_below_the_adapter_is_taken_only_where_it_is_w_0(kind: str, case: Case) -> None:
    model = case.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = case.adapt(model)
    modules = layers(adapted, case)
    kept = all(
        torch.equal(plain_layer(module).weight, before[f"{name}.weight"])
        for name, module in modules.items()
    )
    if kept:
        recorder = dd.Recorder(adapted, case.followed)
        recorder.record()
        assert set(recorder.trajectory["site"]) == set(modules)
        return
    with pytest.raises(BaselineError, match=r"rewrote the base weight of .*capture_baseline"):
        dd.Recorder(adapted, case.followed)


@pytest.mark.parametrize(("kind", "case"), REFUSED)
def test_refused_with_the_reason(kind: str, case: Case) -> None:
    model = case.adapt(case.build())
    with pytest.raises(NoDenseWeightError, match=case.refused):
        dd.Recorder(model, ["query"]).record()


@pytest.mark.parametrize(("kind", "case"), FOLLOWABLE)
def test_disabled_merged_and_several(kind: str, case: Case) -> None:
    model = case.adapt(case.build())
    shake(model)
    modules = layers(model, case)
    applied = {name: dense_weight(module).double() for name, module in modules.items()}
    model.base_model.disable_adapter_layers()
    for name, module in modules.items():
        assert_applied(case, model, name, module)
    model.base_model.enable_adapter_layers()
    for name, module in modules.items():
        torch.testing.assert_close(dense_weight(module).double(), applied[name], rtol=0, atol=1e-6)
    if "bias on none" not in case.name:
        model.merge_adapter()
        for name, module in modules.items():
            assert is_merged(module)
            torch.testing.assert_close(
                dense_weight(module).double(), applied[name], rtol=1e-5, atol=1e-5
            )
        with pytest.raises(BaselineError, match=r"is merged into|rewrote"):
            dd.Recorder(model, case.followed)
        if kind == "OSF":  # does not unmerge
            return
        model.unmerge_adapter()
    if not add_second(model):
        return
    shake(model)
    for name, module in layers(model, case).items():
        assert_applied(case, model, name, module)


class Trained:
    """What a training left behind."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.before: dict[str, torch.Tensor] = {}
        self.random_state = torch.empty(0)
        self.waits: dict[str, int] = {}
        self.model: Any = None
        self.trajectory: Any = None


def trained(case: Case, *, record: bool) -> Trained:
    """The case after a few steps, with a recorder attached to them or not."""
    result = Trained()
    model = case.build()
    result.before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if record:
        baseline = dd.capture_baseline(model, case.followed)
    result.model = model = case.adapt(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(7)

    def train() -> None:
        generator = torch.Generator().manual_seed(3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = model(case.model.batch(generator)).square().mean()  # type: ignore[attr-defined]
            loss.backward()
            optimizer.step()
            result.losses.append(loss.item())

    if record:
        recorder = dd.Recorder(model, case.followed, every=1, baseline=baseline)
        with recorder.attach(optimizer):
            train()
        recorder.step += 1
        with Waits() as waits:
            recorder.record()
        result.waits = waits.found
        result.trajectory = recorder.trajectory
    else:
        train()
    result.random_state = torch.get_rng_state()
    return result


def layers(model: Any, case: Case) -> dict[str, nn.Module]:
    """The followed modules by their names in the model before PEFT."""
    found = {}
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.")
        inside = INSIDE & set(name.split("."))
        mine = name.split(".")[-1] in case.followed and not inside
        if mine and is_tuner_layer(resolved(module)):
            found[name] = module
    assert found
    return found


def plain_layer(module: nn.Module) -> Any:
    return resolved(module).get_base_layer()  # type: ignore[operator]


def double_copy(case: Case, model: nn.Module) -> Any:
    """The whole model in float64 and eval mode; built anew where it cannot be copied."""
    try:
        other = copy.deepcopy(model)
    except RuntimeError:
        other = case.adapt(case.build())
        other.load_state_dict(model.state_dict())
    for module in other.modules():
        if "dtype" in vars(module):
            vars(module)["dtype"] = torch.float64
    return other.double().eval()


def merged_weights(case: Case, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """PEFT's own merge of a copy of the whole model; None where it does not merge."""
    names = layers(model, case)
    if case.name == "bias on none":
        with pytest.raises(RuntimeError, match="base layer has no bias"):
            double_copy(case, model).merge_and_unload()
        return None
    merged = double_copy(case, model).merge_and_unload()
    return {name: merged.get_submodule(name).weight.detach() for name in names}


def probe(case: Case, model: nn.Module, name: str) -> torch.Tensor | None:
    """The weight read off what a copy of the layer does; None for what has no matrix."""
    if case.followed == ("norm",):
        return None
    layer = double_copy(case, model).base_model.model.get_submodule(name)
    return probed(layer, plain_layer(layer))


@torch.no_grad()
def probed(layer: Callable[[torch.Tensor], torch.Tensor], plain: Any) -> torch.Tensor | None:
    if isinstance(plain, nn.Embedding):
        return layer(torch.arange(plain.num_embeddings))
    if isinstance(plain, nn.Conv2d):
        return probed_convolution(layer, plain)
    rows, columns = plain.weight.shape
    transposed = type(plain).__name__ == "Conv1D"
    features = rows if transposed else columns
    basis = torch.eye(features, dtype=torch.float64)[None]
    weight = layer(basis)[0] - layer(torch.zeros_like(basis))[0]
    return weight if transposed else weight.T


def probed_convolution(
    layer: Callable[[torch.Tensor], torch.Tensor], plain: nn.Conv2d
) -> torch.Tensor:
    """By least squares: the response to random images, against their unfolded patches."""
    images = torch.randn(400, plain.in_channels, 6, 7, dtype=torch.float64)
    assert not isinstance(plain.padding, str)
    unfold = nn.Unfold(plain.kernel_size, plain.dilation, plain.padding, plain.stride)
    patches = unfold(images).transpose(1, 2).flatten(0, 1)
    answers = (layer(images) - layer(torch.zeros_like(images))).flatten(2).transpose(1, 2)
    solution: torch.Tensor = torch.linalg.lstsq(patches, answers.flatten(0, 1)).solution
    return solution.T.reshape(plain.weight.shape)


def assert_applied(case: Case, model: nn.Module, name: str, module: nn.Module) -> None:
    try:
        expected = probe(case, model, name)
    except (RuntimeError, ValueError):
        # C3A feeds the second adapter what the first made of the input, and overlapping tokens are
        # refused: PEFT itself cannot run these.
        assert case.options.keys() & {"block_size", "token_indices"}
        assert len(resolved(module).active_adapters) > 1  # type: ignore[arg-type]
        return
    if expected is not None:
        torch.testing.assert_close(dense_weight(module).double(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move every adapter's parameters a little, so that none of them is at its start."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "head" not in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def add_second(model: Any) -> bool:
    """Add a second adapter of the same configuration and activate both, where PEFT can."""
    config = copy.deepcopy(model.peft_config["default"])
    try:
        with OnCpu():
            model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AttributeError):
        return False
    return True
