"""The sums behind every measure, as fast as the weights can be read.

Everything that `decomposition` reports follows from four sums per unit. A kernel sees tensors
whose first dimension counts units and whose second counts features, and returns these sums. There
is one file a path; all give the same numbers:

- `blocks`: CPU, numpy over cache-sized blocks; the core install.
- `numba_path`: CPU, compiled; with the extra `fast`.
- `triton_path`: NVIDIA and AMD GPUs, all weights in one launch; wherever torch ships Triton.
- `sums.exact_tensors`: plain torch in float64, any other device that has it; the definition. What
  `torch.compile` makes for a GPU is Triton: where that is missing it is no help.
- `low_rank`: LoRA and DoRA from their factors, on any device; `triton_low_rank` on GPUs, planned by
  `triton_low_rank_plan`, fed by `triton_gather`, and `triton_low_rank_again` where float32 was too
  little.
"""

from __future__ import annotations

from dora_dynamics._kernels.dispatch import dense_sums, dense_sums_of_all
from dora_dynamics._kernels.low_rank import low_rank_sums, low_rank_sums_of_all
from dora_dynamics._kernels.low_rank_update import LowRankUpdate
from dora_dynamics._kernels.queueing import (
    QueuedSums,
    Transfer,
    queue_dense_sums,
    queue_low_rank_sums,
)
from dora_dynamics._kernels.sums import UnitSums, on_device, queued

__all__ = [
    "LowRankUpdate",
    "QueuedSums",
    "Transfer",
    "UnitSums",
    "dense_sums",
    "dense_sums_of_all",
    "low_rank_sums",
    "low_rank_sums_of_all",
    "on_device",
    "queue_dense_sums",
    "queue_low_rank_sums",
    "queued",
]
