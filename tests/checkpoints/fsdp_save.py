"""Save a model sharded over processes, as FSDP does: `torchrun fsdp_save.py FOLDER`."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

warnings.simplefilter("ignore")


class Projections(nn.Module):
    """Rows that do not divide by the number of processes, so that shards are uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 5)
        self.v_proj = nn.Linear(6, 8, bias=False)


def model() -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    return Projections()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    sharded = model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.mul_(1.5).add_(0.01)
    save({"model": sharded.state_dict()}, checkpoint_id=sys.argv[1])
    dist.barrier()
    os._exit(0)  # see tests/torchrun.py
