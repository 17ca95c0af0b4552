"""Weights that several processes hold together (DTensor), measured where they are.

FSDP2 (`fully_shard`), tensor parallelism and their two-dimensional mesh keep of each weight a block
on each process. Four sums per unit say all there is to say, and sums can be taken block by block:
each process sums what it holds, one all-reduce adds up what all hold, for all weights together.
No weight is gathered; of a LoRA or DoRA, only what is of rank size.

- `holding`: which rows and columns this process holds.
- `adapted`: what of an adapter's factors each process needs.
- `collectives`: the few things that processes tell each other.
- `shares`: the sums of the blocks that this process holds.
- `changes`: from blocks to the change of each unit.
- `together`: record after record, whatever fails on one of the processes.
- `baseline`: W_0, sharded as the weight is.
- `models`: ways of sharding that hide the weights, refused by name.
"""

from __future__ import annotations

from dora_dynamics.sharded.holding import Adapted as Adapted
from dora_dynamics.sharded.holding import FailedElsewhereError as FailedElsewhereError
from dora_dynamics.sharded.holding import ShardingError as ShardingError
