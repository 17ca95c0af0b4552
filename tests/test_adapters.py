"""LoRA and DoRA against PEFT's, their gradients against the paper's equations and gradcheck."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import dora_dynamics as dd
from dora_dynamics.adapters import DoRA, LoRA, adapter_of
from dora_dynamics.errors import InputError
from dora_dynamics.sites import NoSiteMatchesError, find_sites

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]

APPLY = {"LoRA": dd.apply_lora, "DoRA": dd.apply_dora}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def grad(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def adapters(model: nn.Module) -> dict[str, LoRA]:
    found = {name: adapter_of(module) for name, module in model.named_modules()}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def disturb(model: nn.Module, seed: int = 5) -> None:
    """Moves A, B and m away from where they start, some m below zero."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            for parameter in adapter.parameters():
                noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                parameter.add_(noise.to(parameter), alpha=0.3)
            if isinstance(adapter, DoRA):
                adapter.magnitude[1] *= -1


def peft_of(model: nn.Module, dora: bool, targets: list[str], **options: Any) -> Any:
    """PEFT's model with the same adapters as `model` will carry: rank 3, alpha 7."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.0, target_modules=targets, use_dora=dora, **options
    )
    return peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)


def peft_parameters(theirs: Any, name: str) -> dict[str, nn.Parameter]:
    layer = theirs.base_model.model.get_submodule(name)
    parameters = {
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
    }
    if len(layer.lora_magnitude_vector):
        parameters["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return parameters


def copy_to_peft(ours: nn.Module, theirs: Any) -> None:
    with torch.no_grad():
        for name, adapter in adapters(ours).items():
            for key, parameter in peft_parameters(theirs, name).items():
                parameter.copy_(getattr(adapter, key).view_as(parameter))


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
class TestAgainstPeft:
    def pair(self, build: Build, method: str) -> tuple[nn.Module, Any]:
        ours = build().double().eval()
        theirs = peft_of(ours, method == "DoRA", ["query", "value"])
        APPLY[method](ours, ["query", "value"], rank=3, alpha=7)
        disturb(ours)
        copy_to_peft(ours, theirs)
        return ours, theirs.eval()

    def test_outputs_and_gradients(self, method: str, tiny_transformer: Build) -> None:
        ours, theirs = self.pair(tiny_transformer, method)
        tokens = torch.arange(55).view(5, 11) % 11
        out = ours(tokens)
        out_theirs = theirs(tokens)
        torch.testing.assert_close(out, out_theirs, rtol=1e-12, atol=1e-12)
        pull = randn(*out.shape, seed=9)
        (out * pull).sum().backward()
        (out_theirs * pull).sum().backward()
        assert len(adapters(ours)) == 4
        for name, adapter in adapters(ours).items():
            for key, parameter in peft_parameters(theirs, name).items():
                gradient = grad(getattr(adapter, key))
                assert gradient.abs().max() > 0
                torch.testing.assert_close(
                    gradient, grad(parameter).view_as(gradient), rtol=1e-10, atol=1e-13
                )

    def test_merged_weights(self, method: str, tiny_transformer: Build) -> None:
        ours, theirs = self.pair(tiny_transformer, method)
        names = list(adapters(ours))
        dd.merge(ours)
        merged = theirs.merge_and_unload()
        for name in names:
            assert isinstance(weight_of(ours, name), nn.Parameter)
            torch.testing.assert_close(
                weight_of(ours, name), weight_of(merged, name), rtol=1e-13, atol=1e-14
            )

    def test_training_takes_the_same_path(
        self, method: str, tiny_transformer: Build, train: Train
    ) -> None:
        ours, theirs = self.pair(tiny_transformer, method)
        losses = []
        for model in (ours, theirs):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
            losses.append(train(model, optimizer, 8))
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
        for name, adapter in adapters(ours).items():
            for key, parameter in peft_parameters(theirs, name).items():
                mine = getattr(adapter, key)
                torch.testing.assert_close(
                    mine.data, parameter.data.view_as(mine), rtol=1e-7, atol=1e-9
                )

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's call
    def test_gpt2_conv1d(self, method: str, tiny_gpt2: Callable[[], Any]) -> None:
        ours = tiny_gpt2().double().eval()
        targets = ["c_attn", "mlp.c_proj"]
        theirs = peft_of(ours, method == "DoRA", targets, fan_in_fan_out=True).eval()
        sites = APPLY[method](ours, targets, rank=3, alpha=7)
        assert {site.stored_transposed for site in sites} == {True}
        assert adapters(ours)["transformer.h.0.attn.c_attn"].lora_B.shape == (36, 3)
        disturb(ours)
        copy_to_peft(ours, theirs)
        tokens = torch.arange(20).view(2, 10)
        results = [model(tokens, labels=tokens) for model in (ours, theirs)]
        torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-11, atol=1e-11)
        for result in results:
            result.loss.backward()
        for name, adapter in adapters(ours).items():
            for key, parameter in peft_parameters(theirs, name).items():
                gradient = grad(getattr(adapter, key))
                torch.testing.assert_close(
                    gradient, grad(parameter).view_as(gradient), rtol=1e-9, atol=1e-13
                )
        before = ours(tokens).logits
        dd.merge(ours)
        merged = theirs.merge_and_unload()
        torch.testing.assert_close(ours(tokens).logits, before, rtol=1e-13, atol=1e-13)
        for site in sites:
            torch.testing.assert_close(
                weight_of(ours, site.name), weight_of(merged, site.name), rtol=1e-13, atol=1e-14
            )


@pytest.mark.parametrize("transposed", [False, True])
class TestGradients:
    """W_0 of shape (5, 8) or its transpose, A, B and m away from their start."""

    def dora(self, *, transposed: bool, detach_norm: bool) -> tuple[DoRA, torch.Tensor]:
        weight = randn(8, 5) if transposed else randn(5, 8)
        adapter = DoRA(
            weight, rank=3, alpha=4, stored_transposed=transposed, detach_norm=detach_norm
        )
        with torch.no_grad():
            adapter.lora_B.copy_(randn(5, 3, seed=1))
            adapter.magnitude.mul_(torch.tensor([1.2, 0.8, -0.5, 1.0, 3.0]))
        return adapter, weight

    @pytest.mark.parametrize("detach_norm", [False, True])
    def test_equations_6_7_and_11(self, transposed: bool, detach_norm: bool) -> None:
        adapter, weight = self.dora(transposed=transposed, detach_norm=detach_norm)
        G = randn(5, 8, seed=2)  # ∇_{W'} L
        effective = adapter(weight)
        ((effective.T if transposed else effective) * G).sum().backward()
        A, B, m = (p.detach().numpy() for p in (adapter.lora_A, adapter.lora_B, adapter.magnitude))
        W0, s, g = (weight.T if transposed else weight).numpy(), 4 / 3, G.numpy()
        V = W0 + s * B @ A
        norm = np.linalg.norm(V, axis=1)
        expected_m, expected_V = np.empty(5), np.empty((5, 8))
        for n in range(5):
            expected_m[n] = g[n] @ V[n] / norm[n]
            projection = np.eye(8) - np.outer(V[n], V[n]) / norm[n] ** 2
            expected_V[n] = m[n] / norm[n] * (g[n] if detach_norm else projection @ g[n])
        checks = [
            (adapter.magnitude, expected_m),
            (adapter.lora_B, s * expected_V @ A.T),
            (adapter.lora_A, s * B.T @ expected_V),
        ]
        for parameter, expected in checks:
            assert parameter.grad is not None
            np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(
            (effective.T if transposed else effective).detach().numpy(),
            m[:, None] * V / norm[:, None],
            rtol=1e-12,
        )
        if not detach_norm:  # Eq. 6 leaves no gradient along the unit's own direction
            np.testing.assert_allclose((expected_V * V).sum(1), 0, atol=1e-13)

    def test_gradcheck_of_the_exact_variant(self, transposed: bool) -> None:
        adapter, weight = self.dora(transposed=transposed, detach_norm=False)

        def effective(A: torch.Tensor, B: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
            values = {"lora_A": A, "lora_B": B, "magnitude": m}
            result: torch.Tensor = torch.func.functional_call(adapter, values, (weight,))
            return result

        inputs = tuple(
            p.detach().clone().requires_grad_()
            for p in (adapter.lora_A, adapter.lora_B, adapter.magnitude)
        )
        assert torch.autograd.gradcheck(effective, inputs)

    def test_variants_agree_forward_and_differ_backward(self, transposed: bool) -> None:
        results = []
        for detach_norm in (False, True):
            torch.manual_seed(0)
            adapter, weight = self.dora(transposed=transposed, detach_norm=detach_norm)
            effective = adapter(weight)
            effective.pow(3).sum().backward()
            results.append((effective, grad(adapter.magnitude), grad(adapter.lora_B)))
        exact, detached = results
        assert torch.equal(exact[0], detached[0])
        torch.testing.assert_close(exact[1], detached[1])
        assert not torch.allclose(exact[2], detached[2], rtol=0.1)


def kept_bytes(model: nn.Module, inputs: torch.Tensor) -> int:
    """What autograd keeps from forward to backward, each memory once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(inputs)
    size = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    out.sum().backward()
    return size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_backward(dtype: torch.dtype) -> None:
    """Bytes: W' for the layer; the detached norm keeps no V = W_0 + s B A beside it, in fp32."""
    plain = nn.Sequential(nn.Linear(70, 50, dtype=dtype))
    inputs = torch.ones(3, 70, dtype=dtype, requires_grad=True)
    kept = {}
    adapt: dict[str, Callable[..., Any]] = {
        "LoRA": dd.apply_lora,
        "detached": dd.apply_dora,
        "exact": partial(dd.apply_dora, detach_norm=False),
    }
    for name, apply in adapt.items():
        model = copy.deepcopy(plain)
        apply(model, ["0"], rank=4)
        disturb(model)
        kept[name] = kept_bytes(model, inputs)
    elements, units = 70 * 50, 50
    assert kept["LoRA"] == elements * dtype.itemsize + inputs.nbytes
    assert kept["detached"] == kept["LoRA"] + 4 * units  # the norms
    assert kept["exact"] >= kept["LoRA"] + 4 * elements


def test_the_detached_norm_keeps_less_than_pefts() -> None:
    """PEFT's DoRA keeps, beside what grows with the tokens, more than one dense weight."""
    ours = nn.Sequential(nn.Linear(70, 50))
    theirs = peft_of(ours, True, ["0"])
    dd.apply_dora(ours, ["0"], rank=3, alpha=7)
    inputs = torch.ones(3, 70, requires_grad=True)
    assert kept_bytes(ours, inputs) < kept_bytes(theirs, inputs)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_the_detached_norm_are_those_of_autograd(transposed: bool) -> None:
    """Also for W_0 itself, of second order, and where only some of the factors train."""
    weight = (randn(8, 5) if transposed else randn(5, 8)).requires_grad_()
    adapter = DoRA(weight, rank=3, alpha=4, stored_transposed=transposed).double()
    with torch.no_grad():
        adapter.lora_B.copy_(randn(5, 3, seed=1))
        adapter.magnitude.mul_(torch.tensor([1.2, 0.8, -0.5, 1.0, 3.0]))
    inputs = [weight, adapter.lora_A, adapter.lora_B, adapter.magnitude]

    def plain() -> torch.Tensor:
        turned = adapter._updated(weight)
        norm = torch.linalg.vector_norm(turned.detach(), dim=0 if transposed else 1, keepdim=True)
        effective: torch.Tensor = (adapter.magnitude.view_as(norm) / norm) * turned
        return effective

    first, second = [], []
    for effective in (adapter(weight), plain()):
        found = torch.autograd.grad(effective.pow(3).sum(), inputs, create_graph=True)
        first.append(found)
        squares = torch.stack([g.pow(2).sum() for g in found])
        second.append(torch.autograd.grad(squares.sum(), inputs))
    for one, other in zip(first[0] + second[0], first[1] + second[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    for parameter in inputs:
        for other in inputs:
            other.requires_grad_(other is parameter)
        (alone,) = torch.autograd.grad(adapter(weight).pow(3).sum(), [parameter])
        expected = first[1][[one is parameter for one in inputs].index(True)]
        torch.testing.assert_close(alone, expected, rtol=1e-11, atol=1e-12)


def test_gradients_of_each_sample() -> None:
    """torch.func, which needs a rule of ours for the detached norm."""
    model = nn.Sequential(nn.Linear(7, 5))
    dd.apply_dora(model, ["0"], rank=2)
    disturb(model)
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(model, values, (one,))
        return out.tanh().sum()

    samples = randn(3, 7).float()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, samples)
    for i, one in enumerate(samples):
        model.zero_grad()
        model(one).tanh().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(each[name][i], grad(parameter))


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
class TestApply:
    def test_starts_at_the_pretrained_weights_and_freezes_the_rest(
        self, method: str, tiny_transformer: Build
    ) -> None:
        plain, model = tiny_transformer(), tiny_transformer()
        sites = APPLY[method](model, ["query", "value"], rank=3, alpha=7)
        assert [site.name for site in sites] == list(adapters(model))
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        per_site = 2 if method == "LoRA" else 3
        assert len(trainable) == per_site * 4
        assert all(".parametrizations.weight.0." in name for name in trainable)
        for site in sites:
            start, pretrained = weight_of(model, site.name), weight_of(plain, site.name)
            torch.testing.assert_close(start, pretrained, rtol=2e-7, atol=0)
        for adapter in adapters(model).values():
            bound = np.sqrt(6 / (6 * adapter.lora_A.shape[1]))  # Kaiming-uniform with a = √5
            assert 0.5 * bound < adapter.lora_A.abs().max() <= bound
            assert adapter.scaling == pytest.approx(7 / 3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_weights_have_full_precision_adapters(
        self, method: str, dtype: torch.dtype, device: str
    ) -> None:
        model = nn.Sequential(nn.Linear(33, 20)).to(device, dtype)
        before = weight_of(model, "0").detach().clone()
        APPLY[method](model, ["0"], rank=2)
        assert {p.dtype for p in adapters(model)["0"].parameters()} == {torch.float32}
        assert weight_of(model, "0").dtype == dtype
        assert torch.equal(weight_of(model, "0"), before)
        model(torch.ones(3, 33, device=device, dtype=dtype)).float().sum().backward()
        disturb(model)
        adapter = adapters(model)["0"]
        expected = before.double() + adapter.scaling * (
            adapter.lora_B.double() @ adapter.lora_A.double()
        )
        if isinstance(adapter, DoRA):
            expected *= (adapter.magnitude.double() / expected.norm(dim=1))[:, None]
        torch.testing.assert_close(weight_of(model, "0"), expected.to(dtype), rtol=0.01, atol=1e-4)
        dd.merge(model)
        assert weight_of(model, "0").dtype == dtype

    def test_generator_decides_the_start_on_every_device(
        self, method: str, tiny_transformer: Build, device: str
    ) -> None:
        def start(seed: int, device: str = device) -> torch.Tensor:
            model = tiny_transformer().to(device)
            state = torch.get_rng_state()
            APPLY[method](model, ["query"], generator=torch.Generator().manual_seed(seed))
            assert torch.equal(torch.get_rng_state(), state)
            return adapters(model)["layers.0.query"].lora_A.detach()

        assert start(3).device.type == device
        assert torch.equal(start(3).cpu(), start(3, "cpu"))
        assert not torch.equal(start(3), start(4))

    def test_second_application_leaves_the_first_one_training(
        self, method: str, tiny_transformer: Build
    ) -> None:
        model = tiny_transformer()
        APPLY[method](model, ["query"], rank=2)
        adapters(model)["layers.1.query"].lora_A.requires_grad_(False)
        dd.apply_lora(model, ["value"], rank=5)
        frozen = {
            f"{name}.{key}"
            for name, adapter in adapters(model).items()
            for key, p in adapter.named_parameters()
            if not p.requires_grad
        }
        assert frozen == {"layers.1.query.lora_A"}

    def test_same_layer_twice_is_refused(self, method: str, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        APPLY[method](model, ["query"])
        with pytest.raises(ValueError, match=r"layers.0.query already has a parametrized weight"):
            APPLY[method](model, ["query", "value"])
        assert set(adapters(model)) == {"layers.0.query", "layers.1.query"}

    def test_rank_below_one_is_refused(self, method: str, tiny_transformer: Build) -> None:
        with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
            APPLY[method](tiny_transformer(), ["query"], rank=0)
        model = tiny_transformer()
        not_whole: tuple[Any, ...] = (2.5, "4", None)
        for rank in not_whole:
            with pytest.raises(InputError, match="rank must be a whole number"):
                APPLY[method](model, ["query"], rank=rank)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_nothing_matched_lists_what_there_is_and_changes_nothing(
        self, method: str, tiny_transformer: Build
    ) -> None:
        model = tiny_transformer()
        with pytest.raises(NoSiteMatchesError) as raised:
            APPLY[method](model, ["query", "q_lin"])
        message = str(raised.value)
        assert "'q_lin'" in message
        for role in ("query", "key", "value", "output", "head"):
            assert f"'{role}'" in message
        assert "layers.0.query" in message
        assert all(p.requires_grad for p in model.parameters())

    def test_targets_by_role_path_glob_and_pattern(
        self, method: str, tiny_transformer: Build
    ) -> None:
        def selected(*targets: str | re.Pattern[str]) -> set[str]:
            return {site.name for site in APPLY[method](tiny_transformer(), targets)}

        assert selected("output") == {"layers.0.out_proj", "layers.1.out_proj"}
        assert selected("layers.1.value") == {"layers.1.value"}
        assert selected("layers.0.*") == {
            f"layers.0.{name}" for name in ("query", "key", "value", "out_proj")
        }
        assert selected(re.compile(r"1\.(query|key)$")) == {"layers.1.query", "layers.1.key"}
        with pytest.raises(TypeError, match=r"must be a list of strings: \['query'\]"):
            APPLY[method](tiny_transformer(), "query")


def test_dora_leaves_a_zero_unit_zero(tiny_transformer: Build, train: Train) -> None:
    model = tiny_transformer()
    weight_of(model, "layers.0.query").data[2] = 0
    for detach_norm in (True, False):
        adapted = copy.deepcopy(model)
        dd.apply_dora(adapted, ["query"], rank=2, detach_norm=detach_norm)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        losses = train(adapted, torch.optim.AdamW(trained, lr=0.1), 4)
        assert np.isfinite(losses).all()
        assert all(torch.isfinite(p).all() for p in trained)
        assert torch.isfinite(weight_of(adapted, "layers.0.query")).all()


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
class TestMerge:
    def test_plain_modules_with_equal_outputs_after_training(
        self, method: str, tiny_transformer: Build, train: Train, device: str
    ) -> None:
        plain = tiny_transformer().to(device)
        model = copy.deepcopy(plain)
        sites = APPLY[method](model, ["query", "value"], rank=3)
        train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05), 5)
        model.eval()
        tokens = torch.arange(33, device=device).view(3, 11) % 11
        before = model(tokens)
        effective = {s.name: weight_of(model, s.name).clone() for s in sites}
        assert dd.merge(model) is model
        torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(before, plain.eval()(tokens), rtol=1e-3)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
        for module, original in zip(model.modules(), plain.modules(), strict=True):
            assert type(module) is type(original)
            assert not parametrize.is_parametrized(module)
        for name, weight in effective.items():
            merged = weight_of(model, name)
            assert isinstance(merged, nn.Parameter)
            assert torch.equal(merged, weight)
            assert not merged.requires_grad
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(plain(tokens), model(tokens), rtol=0, atol=0)

    def test_merged_and_adapted_models_can_be_copied(
        self, method: str, tiny_transformer: Build
    ) -> None:
        model = tiny_transformer().eval()
        APPLY[method](model, ["query"], rank=3)
        disturb(model)
        twin = copy.deepcopy(model)
        tokens = torch.arange(11).view(1, 11)
        torch.testing.assert_close(twin(tokens), model(tokens), rtol=0, atol=0)
        dd.merge(twin)
        assert len(adapters(model)) == 2
        assert find_sites(twin, ["query"]) == find_sites(model, ["query"])
        torch.testing.assert_close(twin(tokens), model(tokens), rtol=1e-5, atol=1e-6)
        again = copy.deepcopy(model)
        dd.merge(model)
        torch.testing.assert_close(model(tokens), again(tokens), rtol=1e-5, atol=1e-6)

    def test_nothing_to_merge(self, method: str, tiny_transformer: Build) -> None:
        model = tiny_transformer()
        with pytest.raises(ValueError, match="carries no LoRA or DoRA"):
            dd.merge(model)
        APPLY[method](model, ["query"])
        dd.merge(model)
        with pytest.raises(ValueError, match="carries no LoRA or DoRA"):
            dd.merge(model)


def test_foreign_parametrizations_survive_a_merge(tiny_transformer: Build) -> None:
    model = tiny_transformer()
    nn.utils.parametrizations.weight_norm(model.get_submodule("head"))
    dd.apply_lora(model, ["query"])
    dd.merge(model)
    assert parametrize.is_parametrized(model.get_submodule("head"))


def test_a_parametrization_on_top_of_an_adapter_is_named_and_nothing_merged(
    tiny_transformer: Build,
) -> None:
    model = tiny_transformer()
    dd.apply_lora(model, ["query"])
    parametrize.register_parametrization(
        model.get_submodule("layers.1.query"), "weight", nn.Identity()
    )
    with pytest.raises(InputError, match="carries another parametrization beside its LoRA"):
        dd.merge(model)
    assert set(adapters(model)) == {"layers.0.query"}


def test_bert_attention_output_is_not_the_down_projection(tiny_bert: nn.Module) -> None:
    roles = {site.name: site.role for site in find_sites(tiny_bert, ["*"])}
    assert roles["encoder.layer.1.attention.output.dense"] == "output"
    assert roles["encoder.layer.1.output.dense"] == "down"
    assert roles["encoder.layer.1.attention.self.query"] == "query"


def test_layers_of_a_wrapped_model_keep_their_numbers(tiny_bert: nn.Module) -> None:
    wrapped = nn.Sequential(tiny_bert)
    assert [site.layer for site in find_sites(wrapped, ["query"])] == [0, 1]
