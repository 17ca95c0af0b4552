"""Models whose weights are not where they seem to be."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dora_dynamics._arrays import is_sharded
from dora_dynamics.sharded.holding import ShardingError

if TYPE_CHECKING:
    from torch import nn

_INSTEAD = (
    "shard with FSDP2 (torch.distributed.fsdp.fully_shard; Accelerate: fsdp_version=2), or compare "
    "the saved checkpoints afterwards (dora-dynamics compare)."
)


def expose(model: nn.Module) -> None:
    """See to it that the model's parameters are its weights, whole or as shards of their own.

    What FSDP2 has gathered for a forward pass is let go of, as it does itself after the backward
    pass: what the optimizer steps are the shards.

    Raises:
        ShardingError: FSDP1, DeepSpeed ZeRO-3 or an old transformers' tensor parallelism hides
            the weights.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ShardingError(
                "DeepSpeed ZeRO-3 shows a recorder empty weights, so that nothing can be "
                "recorded: train with ZeRO-2 or FSDP2, or compare the saved checkpoints "
                "afterwards (dora-dynamics compare)."
            )
        flattened = getattr(parameter, "_is_flat_param", False)
        if flattened or getattr(parameter, "_fsdp_flattened", False):
            raise ShardingError(
                f"FSDP1 (FullyShardedDataParallel) has flattened {name}, and its units with it: "
                + _INSTEAD
            )
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if getattr(module, "_hf_tp_plan", None) and weight is not None and not is_sharded(weight):
            raise ShardingError(
                f"{name} holds a part of its weight that does not say which (transformers' older "
                "tensor parallelism): use a transformers that shards by DTensor."
            )
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapper = getattr(fsdp, "FSDPModule", None)
    if wrapper is not None:
        for module in model.modules():
            if isinstance(module, wrapper):
                module.reshard()
