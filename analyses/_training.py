"""Models and training steps whose cost is measured: real forward, backward and AdamW."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

import dora_dynamics as dd
from analyses._performance import SEED, wait_for_gpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

LINEARS: Final = ["*_proj", "lm_head", "query", "key", "value", "*.dense"]
"""Every linear layer of a LLaMA, then of a BERT."""


@dataclass(frozen=True)
class Shape:
    """A model by its configuration, and the batch it trains on.

    Attributes:
        name: as in the table.
        family: "llama" or "bert".
        width: hidden size.
        inner: width of the MLP.
        layers: number of layers.
        heads: attention heads.
        groups: heads of key and value.
        vocabulary: tokens.
        batch: sequences a step.
        sequence: tokens of each.
        dtype: of the weights, their gradients and AdamW's state.
    """

    name: str
    family: str
    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    batch: int
    sequence: int
    dtype: torch.dtype = torch.float32

    @property
    def targets(self) -> list[str]:
        """What selects every linear layer of the model."""
        return LINEARS[:2] if self.family == "llama" else LINEARS[2:]


LLAMA_1B: Final = Shape(
    "LLaMA 1.1B, bf16", "llama", 2048, 5632, 22, 32, 4, 32000, 8, 1024, torch.bfloat16
)
"""The shape of TinyLlama-1.1B; its output layer is a weight of its own, and is followed too."""
LLAMA_LAYER: Final = Shape(
    "LLaMA-7B layer, bf16", "llama", 4096, 11008, 1, 32, 32, 1000, 4, 1024, torch.bfloat16
)
MINILM: Final = Shape("MiniLM, fp32", "bert", 384, 1536, 6, 12, 12, 30522, 32, 64)
BERT_BASE: Final = Shape("BERT-base, fp32", "bert", 768, 3072, 12, 12, 12, 30522, 16, 128)


def model_of(shape: Shape, device: str) -> nn.Module:
    """A model of this shape with random weights, in training mode, made on the device.

    Raises:
        SystemExit: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise SystemExit("needs transformers: pip install 'dora-dynamics[hf]'") from None
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.sequence,
    }
    torch.manual_seed(SEED)
    standard = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            if shape.family == "llama":
                config = transformers.LlamaConfig(
                    **common, num_key_value_heads=shape.groups, use_cache=False
                )
                model: nn.Module = transformers.LlamaForCausalLM(config)
            else:
                model = transformers.BertForSequenceClassification(
                    transformers.BertConfig(**common)
                )
    finally:
        torch.set_default_dtype(standard)
    return model.to(device, shape.dtype).train()


def batch_of(shape: Shape, device: str) -> dict[str, torch.Tensor]:
    """Random tokens, with themselves or a class as labels."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence), generator=generator).to(
        device
    )
    labels = tokens if shape.family == "llama" else tokens[:, 0] % 2
    return {"input_ids": tokens, "labels": labels}


def adapt(model: nn.Module, method: str, targets: list[str], rank: int) -> None:
    """Put the method's adapters on the model; "FT" trains every weight."""
    if method == "LoRA":
        dd.apply_lora(model, targets, rank=rank)
    elif method == "DoRA":
        dd.apply_dora(model, targets, rank=rank)


def adamw(model: nn.Module, device: str) -> torch.optim.AdamW:
    """AdamW over what trains, fused on a GPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01, fused=device == "cuda")


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> Callable[[], None]:
    """One training step, which waits for nothing on a GPU."""
    applied: Any = model

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(applied(**batch).loss)
        optimizer.step()

    return step


def seconds_of(step: Callable[[], None], times: int) -> float:
    """Seconds a step, over several, to the end of the last on the device."""
    wait_for_gpu()
    start = time.perf_counter()
    for _ in range(times):
        step()
    wait_for_gpu()
    return (time.perf_counter() - start) / times
