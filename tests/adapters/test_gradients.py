"""Gradients against the paper's equations and gradcheck, and what is kept for them."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from dora_dynamics.adapters import DoRA
from tests.adapters.layers import disturb, grad, peft_of, randn

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


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
