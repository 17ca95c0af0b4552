"""A training of a few steps, recorded or not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import dora_dynamics as dd


def losses(
    model: Any, recorder: dd.Recorder | None, batch: Callable[[], torch.Tensor], *, lr: float
) -> list[float]:
    """The losses of three steps of AdamW, each on a batch of its own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    with nullcontext() if recorder is None else recorder.attach(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            out = model(batch())
            loss = (out.logits if hasattr(out, "logits") else out).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found
