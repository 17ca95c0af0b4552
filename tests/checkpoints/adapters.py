"""PEFT adapters that were really trained, and PEFT's own merge of them in float64."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import peft
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def train_and_save(
    model: Any, config: Any, folder: Path, steps: int = 3, *, keep_base: bool | str = False
) -> None:
    """A few large steps, so that B is not zero and m is not the norm it began at.

    With `keep_base="auto"`, which is PEFT's own default, embeddings below an adapter are saved too.
    """
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        optimizer = torch.optim.AdamW(
            [p for p in adapted.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1
        )
        tokens = torch.arange(24).view(3, 8) % 50
        for _ in range(steps):
            optimizer.zero_grad()
            output = adapted.base_model(tokens)
            hidden = output["logits" if "logits" in output else "last_hidden_state"]
            (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().mean().backward()
            optimizer.step()
        adapted.save_pretrained(str(folder), save_embedding_layers=keep_base)


def merged(model: Any, folder: Path) -> dict[str, Tensor]:
    """The state dict after PEFT loads and merges the adapter in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        double = copy.deepcopy(model).to(torch.float64)
        loaded = peft.PeftModel.from_pretrained(double, str(folder), autocast_adapter_dtype=False)
        for parameter in loaded.parameters():
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.float64)
        result: Any = loaded.merge_and_unload()
    return {name: tensor.detach() for name, tensor in result.state_dict().items()}
