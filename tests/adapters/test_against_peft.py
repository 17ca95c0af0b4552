"""LoRA and DoRA compute and train as PEFT's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import dora_dynamics as dd
from tests.adapters.layers import (
    APPLY,
    adapters,
    copy_to_peft,
    disturb,
    grad,
    peft_of,
    peft_parameters,
    randn,
    weight_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., nn.Module]
    Train = Callable[..., list[float]]


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
