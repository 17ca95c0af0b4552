"""Tiny models and the float64 numbers that every format is checked against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from torch import Tensor, nn

_logging: Any = transformers.utils.logging
_logging.disable_progress_bar()


def bert(seed: int = 0) -> Any:
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        vocab_size=50,
        max_position_embeddings=16,
    )
    torch.manual_seed(seed)
    return transformers.BertModel(config)


def gpt2(seed: int = 0) -> Any:
    config = transformers.GPT2Config(
        n_embd=24,
        n_layer=2,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(config)


def llama(seed: int = 0, **options: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=16,
        **options,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def nudge(model: Any, seed: int = 1, size: float = 0.01) -> Any:
    """Move every parameter a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def expected(before: Tensor, after: Tensor, axis: str = "output") -> tuple[float, float, float]:
    """ΔM, ΔD and the norm of the update, the plain way, in float64."""
    w, v = before.detach().to(torch.float64), after.detach().to(torch.float64)
    if axis == "input":
        w, v = w.T, v.T
    m_0, m = torch.linalg.vector_norm(w, dim=1), torch.linalg.vector_norm(v, dim=1)
    cosine = (w * v).sum(1) / (m_0 * m)
    return float((m - m_0).abs().mean()), float((1 - cosine).mean()), float((v - w).norm())


def check(
    table: pd.DataFrame,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    transposed: bool = False,
    axis: str = "output",
    tolerance: float = 1e-9,
) -> None:
    """Every row of `table` holds what the two state dicts say."""
    assert len(table) > 0
    for row in table.to_dict("records"):
        w, v = before[f"{row['site']}.weight"], after[f"{row['site']}.weight"]
        w, v = (w.T, v.T) if transposed else (w, v)
        got = [row["delta_magnitude"], row["delta_direction"], row["update_norm"]]
        wanted = expected(w.flatten(1), v.flatten(1), axis)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=tolerance, err_msg=row["site"])
